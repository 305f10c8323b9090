#!/bin/bash
# A guest within a guest that plays the host: `nested.sh host` in the latter makes rxe, starts the router on it, and boots User-mode Linux on two
# virtual NICs of it, where `nested.sh guest` runs unmodified perftest from the one to the other. Beside it are the kernel `linux`, the module
# virtio_rdma.ko for it, and the router.
here=${BASH_SOURCE%/*}
fail() { echo "nested: $*" >&2; exit 1; }
sent() { rdma statistic show link rxe0/1 | tr ' ' '\n' | grep -A1 '^sent_pkts$' | tail -1; }

host() {
    modprobe -a rdma_rxe dummy
    ip link add rxenet type dummy && ip address add 10.43.0.1/24 dev rxenet && ip link set rxenet up || fail "no interface"
    rdma link add rxe0 type rxe netdev rxenet || fail "no rxe"
    # What is between the host's interface's coming up and its GID's being there.
    for turn in {1..50}; do grep -qs 0a2b:0001 /sys/class/infiniband/rxe0/ports/1/gids/* && break; sleep 0.1; done
    local run=/run/nested
    mkdir -p $run && chown nobody $run || fail "no folder"
    "$here/freeflow-router" --rdma-device rxe0 --user nobody --control $run/control --state $run/state \
        --nic name=a,ip=10.0.0.1,mac=02:00:00:00:00:01,socket=$run/a,path=nic \
        --nic name=b,ip=10.0.0.2,mac=02:00:00:00:00:02,socket=$run/b,path=nic 2>$run/log & router=$!
    trap 'kill $router' EXIT
    for turn in {1..100}; do [ -S $run/b ] && [ -S $run/control ] && break; sleep 0.1; done
    [ -S $run/b ] || fail "the router did not start: $(<$run/log)"
    mount -t tmpfs -o size=60% shm /dev/shm 2>/dev/null
    local before=$(sent)
    "$here/linux" mem=192M seccomp=auto root=/dev/root rootfstype=hostfs rootflags=/ rw init="$(realpath "$here")/nested.sh" con=null \
        con0=null,fd:1 panic=-1 nohz=off "virtio_uml.device=$run/a:42" "virtio_uml.device=$run/b:42" </dev/null >$run/console 2>&1
    grep -E '^nested:|BW |#bytes|^ [0-9]+ ' $run/console
    grep -q '^nested: all ran' $run/console || { tail -60 $run/console; cat $run/log; fail "the innermost guest failed"; }
    local carried=$(($(sent) - before))
    echo "rxe of the host sent $carried packets"
    # 400 messages of 64 KiB, in packets of at most 4 KiB.
    [ $carried -gt 6400 ] || { cat $run/log; fail "too few"; }
    kill $router && wait $router || fail "the router ended with $?: $(<$run/log)"
    trap - EXIT
    ! grep -E 'ERROR|panicked' $run/log || fail "the router complains"
}

# As init, in the root file system of the host.
guest() {
    export PATH=/usr/sbin:/usr/bin:/sbin:/bin
    mount -t proc proc /proc && mount -t sysfs sys /sys && mount -t devtmpfs dev /dev && mount -t tmpfs tmp /tmp
    ip link set lo up
    insmod "$here/virtio_rdma.ko" || fail "no driver"
    local n
    for n in 1 2; do
        ip link add eth$n type dummy && ip link set eth$n address 02:00:00:00:00:0$n && ip address add 10.0.0.$n/24 dev eth$n
        ip link set eth$n up
    done
    for n in {1..100}; do ls /sys/class/infiniband/*/ports/1/gids/3 >/dev/null 2>&1 && break; sleep 0.1; done
    local one=$(on eth1) two=$(on eth2) tool
    sed "s/^processor.*/&\ncpu MHz\t\t: 2000/" /proc/cpuinfo >/tmp/cpuinfo && mount --bind /tmp/cpuinfo /proc/cpuinfo
    for tool in "ib_write_bw -s 65536 -n 200" "ib_send_bw -s 65536 -n 100" "ib_read_bw -s 65536 -n 100" "ib_write_lat -s 64 -n 50"; do
        $tool -F -d ${one% *} -x ${one#* } >/tmp/server 2>&1 &
        until grep -q ' 00000000:4853 00000000:0000 0A\|:4853 0*:0000 0A' /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done
        timeout 200 $tool -F -d ${two% *} -x ${two#* } 127.0.0.1 >/tmp/client 2>&1 || { cat /tmp/client; fail "$tool"; }
        wait %1 || { cat /tmp/server; fail "$tool, server"; }
        echo "nested: $tool"; cat /tmp/client
    done
    echo "nested: all ran"
}

# on INTERFACE: the device beside it, and the index of its RoCE v2 GID made from an IPv4 address.
on() {
    local device index gid type
    for device in /sys/class/infiniband/*; do
        [ "$(<$device/ports/1/gid_attrs/ndevs/0)" = $1 ] || continue
        for index in {0..15}; do
            { read -r gid <$device/ports/1/gids/$index && read -r type <$device/ports/1/gid_attrs/types/$index; } 2>/dev/null || continue
            case $gid/$type in 0000:0000:0000:0000:0000:ffff:*/*v2) echo "${device##*/} $index"; return ;; esac
        done
    done
}

if [ $$ = 1 ]; then (guest); poweroff -f; fi
"$@"
