# The second visit, in a new machine: checks that the file system is clean and every file is there.
# From the host: SUM_MIB (MiB of the disk to checksum at the end).
. /run/report.sh
e2fsck -fn /dev/vda
mount -t ext4 /dev/vda /mnt
say_files /mnt/files
dd if=/dev/urandom of=/mnt/files/second-visit bs=1k count=777 conv=fsync 2>/dev/null
umount /mnt
e2fsck -fn /dev/vda
say_disk_sum "$SUM_MIB"
