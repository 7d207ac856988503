#!/bin/sh
# The guest's first process: loads modules, opens the report port, runs the script, powers off. Facts go out as
# "@@ key=value" on the second serial port; the first port is the console, for the user and for post-mortems.
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do insmod "/modules/$module.ko"; done </modules/order

# A machine started by hand may have no second port.
if stty -F /dev/ttyS1 -echo -onlcr 2>/dev/null; then exec 3<>/dev/ttyS1; else exec 3<>/dev/null; fi

disks=$(sed -n 's/.*strata.disks=\([0-9]*\).*/\1/p' /proc/cmdline)
tries=200
while [ "$(ls -d /sys/block/vd* 2>/dev/null | wc -l)" -lt "${disks:-0}" ] && [ "$tries" -gt 0 ]; do
    usleep 50000
    tries=$((tries - 1))
done

if [ -f /run/script ]; then
    sh -eux /run/script
    code=$?
else
    echo 'Strata guest: the disk is /dev/vda; "exit" powers off.'
    setsid cttyhack sh
    code=0
fi
echo "@@ exit=$code" >&3
sync
poweroff -f
