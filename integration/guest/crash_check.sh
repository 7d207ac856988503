# After the crash: mounting replays the journal; then everything synced is there and the file system is clean.
. /run/report.sh
mount -t ext4 /dev/vda /mnt
say_files /mnt/synced
umount /mnt
e2fsck -fn /dev/vda
