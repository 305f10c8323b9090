# Servers that know nothing but TCP, and their clients, for the shells of two guests: NAME_server runs in its shell's place, NAME_client talks
# to it at $TO and fails when something is not what it should be.

redis_server() {
    exec redis-server --bind 0.0.0.0 --port 6379 --protected-mode no --save '' --appendonly no --dir /tmp
}

# Small values and a large one, set over one connection and got over another; then as fast as it goes.
redis_client() {
    local n redis="redis-cli -h $TO"
    for n in {1..200}; do echo "SET key:$n value-$n-$RANDOM$RANDOM"; done >/tmp/sets
    while read -r _ key _; do echo "GET $key"; done </tmp/sets >/tmp/gets
    [ $($redis </tmp/sets | grep -cx OK) = 200 ] || return
    $redis </tmp/gets | cmp - <(cut -d' ' -f3 /tmp/sets) || return
    head -c 1M /dev/urandom | base64 -w 0 >/tmp/large
    $redis -x SET large </tmp/large && $redis GET large | head -c -1 | cmp - /tmp/large || return
    redis-benchmark -h $TO -t set,get -n 500 -c 2 --csv
}

nginx_server() {
    mkdir -p /tmp/web/own && head -c 8M /dev/urandom >/tmp/web/file && sha256sum </tmp/web/file >/tmp/web/sum
    cat >/tmp/web/conf <<-END
	daemon off; user root; pid /tmp/web/pid; error_log /tmp/web/errors; worker_processes 2;
	events { }
	http {
	    access_log off; client_body_temp_path /tmp/web/own; proxy_temp_path /tmp/web/own; fastcgi_temp_path /tmp/web/own;
	    uwsgi_temp_path /tmp/web/own; scgi_temp_path /tmp/web/own;
	    server { listen 8080; root /tmp/web; }
	}
	END
    exec nginx -c /tmp/web/conf
}

# A file whose checksum is another.
nginx_client() {
    curl -sS http://$TO:8080/file | sha256sum | cmp - <(curl -sS http://$TO:8080/sum)
}

iperf3_server() { exec iperf3 -s -1; }

# The server sends, since a receiver that is the client waits for all of it; one that is the server leaves what is still on its way.
iperf3_client() {
    iperf3 -c $TO -R -n 8M -J >/tmp/report
    python3 - /tmp/report <<-END
	import json, sys
	report = json.load(open(sys.argv[1]))
	sent, received = (report["end"][way]["bytes"] for way in ("sum_sent", "sum_received"))
	print("sent", sent, "received", received)
	sys.exit(not sent >= received >= 8 << 20)
	END
}
