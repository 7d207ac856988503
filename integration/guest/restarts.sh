# Writes and verifies while the host does something to the daemon that the guest must not notice.
# From the host: AREA_MIB, CACHE (the mode of the disk's cache; `write through` where whatever was written must be there
# after a kill).

. /run/report.sh
cache=/sys/block/vda/cache_type
echo "$CACHE" >$cache
say "disk.cache=$(cat $cache)"
# Bit 34 of the features that the driver uses: VIRTIO_F_RING_PACKED.
say "packed=$(cut -c35 /sys/block/vda/device/features)"

# Each pass writes an area of its own for each job, and then reads it back.
verify() {
    pass=0
    while [ ! -e /tmp/enough ]; do
        fio --name=verify --filename=/dev/vda --offset_increment="${AREA_MIB}m" --size="${AREA_MIB}m" --numjobs=2 \
            --cpus_allowed=0-1 --cpus_allowed_policy=split --rw=randwrite --bsrange=4k-64k --randseed="$pass" \
            --ioengine=libaio --direct=1 --iodepth=16 --verify=crc32c --verify_fatal=1 --group_reporting \
            --output-format=terse --terse-version=3 --output=/tmp/verify.out
        # fio also exits with 0 when it refuses to work. Fields 5 and 6: error, KiB read; 47: KiB written.
        [ "$(grep '^3;' /tmp/verify.out | cut -d';' -f5,6,47)" = "0;$((AREA_MIB << 11));$((AREA_MIB << 11))" ]
        pass=$((pass + 1))
        say "passes=$pass"
    done
}

(while [ ! -e /tmp/enough ]; do
    say tick=1
    usleep 200000
done) &
(
    read -r _ <&3
    touch /tmp/enough
) &
verify
errors=$(dmesg | grep -ci 'i/o error' || true)
say "errors=$errors"
say "disk.cache.end=$(cat $cache)"
say_disk_sum "$((2 * AREA_MIB))"
