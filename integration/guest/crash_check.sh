# After a crash: checks that all synced data is there. Mounting replays the journal; then the file system is clean.
# From the host: FIRST (1 in the first life, on an empty disk), FILES_MIB (the file system's size; the areas follow
# it), AREA_MIB, FLUSHED (words AREA:PASS).
. /run/report.sh
say "disk.cache=$(cat /sys/block/vda/queue/write_cache)"

# area_options AREA PASS: the range that fio uses, and the pattern in every 512 bytes next to their address.
area_options() {
    printf 'offset=%dM\nsize=%dM\nverify_pattern=0xf1%014x\n' $((FILES_MIB + $1 * AREA_MIB)) "$AREA_MIB" "$2"
}

cat >/tmp/global <<END
[global]
filename=/dev/vda
ioengine=libaio
direct=1
iodepth=16
verify=meta
verify_interval=512
verify_fatal=1
allow_mounted_write=1
group_reporting
END

if [ "$FIRST" = 0 ]; then
    mount -t ext4 /dev/vda /mnt
    say_files /mnt/synced
    umount /mnt
    e2fsck -fn /dev/vda
fi
if [ -n "$FLUSHED" ]; then
    {
        cat /tmp/global
        printf 'rw=read\nbs=64k\n'
        for pair in $FLUSHED; do
            printf '[area-%s]\n' "${pair%:*}"
            area_options "${pair%:*}" "${pair#*:}"
        done
    } >/tmp/check.fio
    fio --output-format=json --output=/tmp/check.json /tmp/check.fio
    say "fio=$(tr -d '\n' </tmp/check.json | tr -s ' ')"
fi
