# Writes and verifies while the host resizes the disk, then uses the new part. From the host: AREA_MIB.

. /run/report.sh
size=/sys/block/vda/size
before=$(cat $size)
say "sectors.before=$before"
queue=/sys/block/vda/queue
say "block.logical=$(cat $queue/logical_block_size)"
say "block.physical=$(cat $queue/physical_block_size)"
say "block.minimum=$(cat $queue/minimum_io_size)"
say "block.optimal=$(cat $queue/optimal_io_size)"

(
    pass=0
    while [ ! -e /tmp/enough ]; do
        fio --name=verify --filename=/dev/vda --size="${AREA_MIB}m" --rw=randwrite --bsrange=4k-64k --randseed="$pass" \
            --ioengine=libaio --direct=1 --iodepth=16 --verify=crc32c --verify_fatal=1 \
            --output-format=terse --terse-version=3 --output=/tmp/verify.out
        [ "$(grep '^3;' /tmp/verify.out | cut -d';' -f5,6,47)" = "0;$((AREA_MIB << 10));$((AREA_MIB << 10))" ]
        pass=$((pass + 1))
        say "passes=$pass"
    done
) &
writer=$!

# The host resizes the disk while the guest waits here, and the writer goes on.
checkpoint resize
tries=0
while [ "$(cat $size)" = "$before" ] && [ $tries -lt 300 ]; do
    usleep 100000
    tries=$((tries + 1))
done
after=$(cat $size)
say "sectors.after=$after"

# The new part reads as zero, and takes data up to its last sector.
blocks=$(((after - before) / 2048))
zero=$(dd if=/dev/vda bs=1M skip=$((before / 2048)) count=$blocks iflag=direct 2>/dev/null | tr -d '\0' | wc -c)
say "new.other_bytes=$zero"
dd if=/dev/urandom of=/tmp/data bs=1M count=1 2>/dev/null
dd if=/tmp/data of=/dev/vda bs=1M seek=$((after / 2048 - 1)) oflag=direct 2>/dev/null
dd if=/tmp/data of=/dev/vda bs=1M seek=$((before / 2048)) oflag=direct 2>/dev/null
sync
for place in $((after / 2048 - 1)) $((before / 2048)); do
    dd if=/dev/vda bs=1M skip=$place count=1 iflag=direct 2>/dev/null | cmp - /tmp/data
done
touch /tmp/enough
wait $writer
errors=$(dmesg | grep -ci 'i/o error' || true)
say "errors=$errors"
say_disk_sum $((after / 2048))
