# Uses three disks, of which the third comes, goes and comes back while the others are written and verified.
# From the host: AREA_MIB.

. /run/report.sh

# verify DISK: writes an area and reads it back.
verify() {
    fio --name="$1" --filename="/dev/$1" --size="${AREA_MIB}m" --rw=randwrite --bsrange=4k-64k --ioengine=libaio \
        --direct=1 --iodepth=16 --verify=crc32c --verify_fatal=1 --output-format=terse --terse-version=3 \
        --output="/tmp/$1.out"
    [ "$(grep '^3;' "/tmp/$1.out" | cut -d';' -f5,6,47)" = "0;$((AREA_MIB << 10));$((AREA_MIB << 10))" ]
}

# await_disk TEST: waits until the third disk is there (-e), or gone (! -e).
await_disk() {
    tries=0
    until [ "$@" /sys/block/vdc ] || [ $tries -ge 600 ]; do
        usleep 100000
        tries=$((tries + 1))
    done
    [ "$@" /sys/block/vdc ]
}

sum() {
    dd if="/dev/$1" bs=1M iflag=direct 2>/dev/null | md5sum | cut -c1-32
}

for disk in vda vdb; do
    (
        while [ ! -e /tmp/enough ]; do
            verify $disk
            say "passes.$disk=1"
        done
    ) &
    writers="${writers:-} $!"
done

checkpoint plug
await_disk -e
say "sectors=$(cat /sys/block/vdc/size)"
verify vdc
sync
say "sum.before=$(sum vdc)"

# It is read when it goes; these reads may fail.
(while dd if=/dev/vdc of=/dev/null bs=64k count=64 iflag=direct 2>/dev/null; do :; done) &
checkpoint unplug
await_disk ! -e
checkpoint again
await_disk -e
say "sum.after=$(sum vdc)"
touch /tmp/enough
for writer in $writers; do
    wait "$writer"
done
for disk in vda vdb vdc; do
    say "sum.$disk=$(sum $disk)"
done
say "errors=$(dmesg | grep -i 'i/o error' | grep -vc vdc || true)"
