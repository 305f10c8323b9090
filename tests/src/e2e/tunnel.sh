#!/bin/bash
# Connections over rsockets for programs that librspreload cannot serve (docs/operations.md says why): netcat, which it can, carries their bytes.
#
# `tunnel.sh listen ADDRESS PORT COUNT TARGET` takes a connection at each of so many ports, and passes it on to TARGET, as socat names it.
# `tunnel.sh enter ADDRESS PORT COUNT` passes its own input and output on to the first of them that nobody has taken.
mode=$1 address=$2 first=$3 count=$4 target=$5

rsocket() { LD_PRELOAD=$(echo /usr/lib/*/rsocket/librspreload.so) exec nc.traditional -n -q 0 "$@"; }

# The target is connected to when the first byte has come, as it would be without a tunnel: iperf3 takes its first connection for the one that it
# controls the others by.
listen() {
    local back=/tmp/tunnel.$1
    rm -f $back && mkfifo $back
    (rsocket -l -s $address -p $1 <$back) |
        { head -c 1 >$back.first && exec socat - "$target" < <(exec cat $back.first -); } >$back
}

for ((port = first; port < first + count; port++)); do
    case $mode in
    listen) listen $port & ;;
    enter) mkdir /tmp/entered.$port 2>/dev/null && rsocket $address $port ;;
    esac
done
wait
