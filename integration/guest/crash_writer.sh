# Writes until the host kills the daemon. A file is reported only after its fsync has returned.
# From the host: MAKE (1 on the first round), ROUND.
. /run/report.sh
say "disk.cache=$(cat /sys/block/vda/queue/write_cache)"
if [ "$MAKE" = 1 ]; then mkfs.ext4 -q -F /dev/vda; fi
mount -t ext4 /dev/vda /mnt
mkdir -p /mnt/synced
checkpoint mounted
fio --name=noise --filename=/mnt/noise --size=48M --rw=randwrite --bsrange=4k-64k --ioengine=libaio --iodepth=8 \
    --direct=1 --fsync=8 --time_based --runtime=600 --output=/tmp/fio.out &
number=0
while :; do
    number=$((number + 1))
    name=$ROUND-$number
    # the file sizes vary around a cluster
    dd if=/dev/urandom of=/tmp/next bs=1k count=$((number * 37 % 301 + 1)) 2>/dev/null
    sum=$(sha256sum </tmp/next | cut -c1-64)
    dd if=/tmp/next of="/mnt/synced/$name" bs=64k conv=fsync 2>/dev/null
    say "synced=$sum $name"
done
