# A file in memory, offered to all hosts as an NVMe disk over RDMA at $ADDRESS.
modprobe -a nvmet nvmet-rdma || exit
mountpoint -q /sys/kernel/config || mount -t configfs none /sys/kernel/config || exit
mkdir /tmp/target && mount -t tmpfs none /tmp/target && truncate -s 64M /tmp/target/disk || exit
cd /sys/kernel/config/nvmet && mkdir subsystems/freeflow subsystems/freeflow/namespaces/1 ports/1 || exit
echo 1 >subsystems/freeflow/attr_allow_any_host
# Files in memory have no direct I/O.
echo 1 >subsystems/freeflow/namespaces/1/buffered_io
echo -n /tmp/target/disk >subsystems/freeflow/namespaces/1/device_path
echo 1 >subsystems/freeflow/namespaces/1/enable || exit
echo rdma >ports/1/addr_trtype
echo ipv4 >ports/1/addr_adrfam
echo "$ADDRESS" >ports/1/addr_traddr
echo 4420 >ports/1/addr_trsvcid
ln -s "$PWD/subsystems/freeflow" ports/1/subsystems/freeflow || exit
rdma_listens 4420
