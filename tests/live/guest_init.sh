#!/bin/busybox sh
# The first process of the guest: swaps on the virtio disk, runs the hog, tells how it went.
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox modprobe -a virtio_pci virtio_blk
/bin/busybox mkswap /dev/vda
/bin/busybox swapon -d /dev/vda || echo "GUEST swapon failed"
: >/stop
/hog 160 /stop
echo "GUEST hog exit $?"
/bin/busybox grep -E '^pswp(in|out) ' /proc/vmstat | while read -r name value; do
    echo "GUEST $name $value"
done
/bin/busybox swapoff /dev/vda && echo "GUEST swapoff done"
/bin/busybox poweroff -f
