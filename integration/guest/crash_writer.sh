# Follows crash_check.sh: writes until the host kills the daemon. Data is reported as synced only after its fsync has
# returned, and an area as begun before its first change.
# From the host also: LIFE, WRITERS, AREAS (per writer), PASS (a number that no life has used yet).

# Each pass of a writer uses its next area. One pass in three discards the area first, one zeroes it first with a
# request that may unmap. (Without the path the shell would use busybox's commands, which cannot do that.)
write_areas() {
    pass=$PASS
    while :; do
        area=$(($1 * AREAS + pass % AREAS))
        place=$(((FILES_MIB + area * AREA_MIB) << 20))
        length=$((AREA_MIB << 20))
        say "begun=$area:$pass"
        case $((pass % 3)) in
        1) /bin/blkdiscard --force -o "$place" -l "$length" /dev/vda ;;
        2) /bin/fallocate --punch-hole --offset "$place" --length "$length" /dev/vda ;;
        esac
        {
            cat /tmp/global
            printf 'rw=randwrite\nbsrange=4k-16k\nrandseed=%d\ndo_verify=0\nfsync=4\nend_fsync=1\n[write]\n' "$pass"
            area_options "$area" "$pass"
        } >"/tmp/write-$1.fio"
        fio --output-format=terse --terse-version=3 --output="/tmp/write-$1.out" "/tmp/write-$1.fio"
        # fio also exits with 0 when it refuses to write. Field 47: KiB written.
        [ "$(grep '^3;' "/tmp/write-$1.out" | cut -d';' -f47)" = $((AREA_MIB << 10)) ]
        say "flushed=$area:$pass"
        pass=$((pass + 1))
    done
}

# The file sizes vary around a cluster. The mount option discard gives the space of deleted files back.
write_files() {
    number=0
    while :; do
        number=$((number + 1))
        name=$LIFE-$number
        dd if=/dev/urandom of=/tmp/next bs=1k count=$((number * 37 % 101 + 1)) 2>/dev/null
        sum=$(sha256sum </tmp/next | cut -c1-64)
        dd if=/tmp/next of="/mnt/synced/$name" bs=64k conv=fsync 2>/dev/null
        say "synced=$sum $name"
        dd if=/dev/zero of="/mnt/passing-$((number % 2))" bs=64k count=16 2>/dev/null
        rm -f "/mnt/passing-$((1 - number % 2))"
    done
}

if [ "$FIRST" = 1 ]; then mkfs.ext4 -q -F /dev/vda "${FILES_MIB}M"; fi
mount -t ext4 -o discard /dev/vda /mnt
mkdir -p /mnt/synced
(
    trap 'say "stopped=files $?"' EXIT
    write_files
) &
writer=0
while [ "$writer" -lt "$WRITERS" ]; do
    (
        trap 'say "stopped=writer $?"' EXIT
        write_areas "$writer"
    ) &
    writer=$((writer + 1))
done
# This loop needs no disk, so it answers after the daemon's end.
while read -r _ <&3; do say alive=yes; done
