# A file system on the NVMe disk at $ADDRESS: files are copied onto it, and read and compared when the kernel has none of it in memory.
modprobe nvme-rdma || exit
tree=/tmp/host
mkdir $tree && mount -t tmpfs none $tree && mkdir $tree/mnt || exit
echo "transport=rdma,traddr=$ADDRESS,trsvcid=4420,nqn=freeflow" >/dev/nvme-fabrics || { dmesg | tail; exit 1; }
for turn in {1..100}; do [ -b /dev/nvme0n1 ] && break; tick; done

# Made in memory and copied: what mkfs has written by the kernel itself cannot go over RDMA here, see docs/operations.md.
truncate -s 64M $tree/image && mkfs.ext4 -q -b 4096 $tree/image || exit
dd if=$tree/image of=/dev/nvme0n1 bs=1M conv=fsync status=none || exit
mount /dev/nvme0n1 $tree/mnt || { dmesg | tail; exit 1; }
head -c 16M /dev/urandom >$tree/mnt/random || exit
cp -r /usr/share/perl5 $tree/mnt || exit
(cd $tree/mnt && find . -type f -exec sha256sum {} +) >$tree/sums || exit
umount $tree/mnt && echo 3 >/proc/sys/vm/drop_caches || exit
mount /dev/nvme0n1 $tree/mnt && (cd $tree/mnt && sha256sum --quiet -c $tree/sums) || exit
umount $tree/mnt && e2fsck -fn /dev/nvme0n1 || exit
wc -l <$tree/sums

echo 1 >/sys/class/nvme/nvme0/delete_controller
umount $tree && rmdir $tree && rmmod nvme-rdma
