# The first visit: reads the disk, creates a file system, works on it, gives space back.
# From the host: FIO_SIZE (MiB for each of two jobs), MKFS_OPTIONS, BASE_MIB (MiB of backing data to read).
. /run/report.sh
queue=/sys/block/vda/queue
say "disk.bytes=$(blockdev --getsize64 /dev/vda)"
say "disk.queues=$(ls /sys/block/vda/mq | wc -l)"
say "disk.serial=$(cat /sys/block/vda/serial)"
say "disk.block=$(cat $queue/logical_block_size)"
say "disk.cache=$(cat $queue/write_cache)"
say "disk.discard_granularity=$(cat $queue/discard_granularity)"
say "disk.discard_max=$(cat $queue/discard_max_bytes)"
say "disk.write_zeroes_max=$(cat $queue/write_zeroes_max_bytes)"
say "base.md5=$(dd if=/dev/vda bs=1M count="$BASE_MIB" iflag=direct 2>/dev/null | md5sum | cut -c1-32)"
checkpoint base

mkfs.ext4 -q -F $MKFS_OPTIONS /dev/vda
mount -t ext4 /dev/vda /mnt
mkdir /mnt/files
checkpoint mkfs

# One job per processor is one job per queue. Every block is read again and its checksum compared.
fio --name=verify --directory=/mnt --size="${FIO_SIZE}M" --numjobs=2 --cpus_allowed=0-1 --cpus_allowed_policy=split \
    --rw=randwrite --bsrange=4k-64k --ioengine=libaio --direct=1 --iodepth=16 --end_fsync=1 \
    --verify=crc32c --verify_fatal=1 --group_reporting --output-format=json --output=/tmp/fio.json
say "fio=$(tr -d '\n' </tmp/fio.json | tr -s ' ')"
say "queue.interrupts=$(awk '/virtio[0-9]+-req\./ {sum = 0; for (i = 2; i <= NF && $i ~ /^[0-9]+$/; i++) sum += $i; printf "%s ", sum}' /proc/interrupts)"
checkpoint fio

number=0
for kib in 1 3 17 64 200 513 1024 2100 4096 8192 7 333; do
    number=$((number + 1))
    dd if=/dev/urandom of="/mnt/files/f$number-${kib}k" bs=1k count="$kib" 2>/dev/null
done
sync
say_files /mnt/files
checkpoint files

rm /mnt/verify.* /mnt/files/f1-* /mnt/files/f3-* /mnt/files/f6-* /mnt/files/f9-*
sync
say "trimmed=$(fstrim -v /mnt | grep -o '[0-9]* bytes' | cut -d' ' -f1)"
checkpoint trim
umount /mnt
