# Takes back what nvme_target.sh made.
cd /sys/kernel/config/nvmet || exit
rm ports/1/subsystems/freeflow && rmdir ports/1 subsystems/freeflow/namespaces/1 subsystems/freeflow || exit
umount /tmp/target && rmdir /tmp/target || exit
for turn in {1..200}; do rmmod nvmet-rdma nvmet 2>/tmp/why && exit; tick; done
cat /tmp/why
exit 1
