#!/bin/busybox sh
# The first process of the guest: sees the host's files, read-only, under a layer of its own, and runs
# a program there, as /environment tells.
/bin/busybox --install -s /bin
mkdir -p /proc /sys /host /layer /machine
mount -t proc proc /proc
mount -t sysfs sys /sys
modprobe -a virtio_pci 9pnet_virtio 9p overlay
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose host /host
mount -t tmpfs layer /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work machine /machine
# Of the host's these show what is another machine's.
for path in proc sys dev run; do
    mkdir -p /machine/$path
done
mount -t proc proc /machine/proc
mount -t sysfs sys /machine/sys
mount -t devtmpfs dev /machine/dev
mount -t tmpfs run /machine/run
mkdir -p /machine/dev/shm
mount -t tmpfs shm /machine/dev/shm
mount -t cgroup2 cgroup /machine/sys/fs/cgroup
# As an installed kernel has them, for `modprobe nbd`.
mkdir -p /machine/lib/modules
cp -r /lib/modules/* /machine/lib/modules
ip link set lo up
# Under emulation a request costs more than its pages.
echo 5 >/proc/sys/vm/page-cluster
cp /hog /machine
. /environment
chroot /machine "$@"
echo "GUEST exit $?"
poweroff -f
