//! Servers that know nothing but TCP, over SMC-R and over rsockets: entries for [`apps`](super::apps).

use std::time::Duration;

use anyhow::{Result, ensure};

use super::apps::App;
use super::bed::Bed;
use super::kernel_users::{PRELOAD, with_smc};
use super::rdma_cm::wait_until;
use super::router::address_of;

/// All of them.
pub static SERVERS: &[App] = &[
    App::steps("redis over SMC-R", |bed| over_smc(bed, &REDIS)),
    App::steps("redis over rsockets", |bed| over_rsockets(bed, &REDIS)),
    App::steps("nginx over SMC-R", |bed| over_smc(bed, &NGINX)),
    App::steps("nginx over rsockets", |bed| over_rsockets(bed, &NGINX)),
    App::steps("iperf3 over SMC-R", |bed| over_smc(bed, &IPERF3)),
    App::steps("iperf3 over rsockets", |bed| over_rsockets(bed, &IPERF3)),
];

/// A server, as `servers.sh` knows it.
#[derive(Debug)]
struct Server {
    name: &'static str,
    port: u16,
    /// That its client makes.
    connections: u16,
    /// Bytes that both send at least.
    carries: u64,
}

const REDIS: Server = Server { name: "redis", port: 6379, connections: 10, carries: 2 << 20 };
const NGINX: Server = Server { name: "nginx", port: 8080, connections: 2, carries: 8 << 20 };
const IPERF3: Server = Server { name: "iperf3", port: 5201, connections: 2, carries: 8 << 20 };

const SCRIPT: &str = include_str!("servers.sh");
const TUNNEL: &str = include_str!("tunnel.sh");

/// Runs a command of the shell for as long as [`STOP`] lets it, as a job whose output goes into one file with that of others.
fn kept(command: &str) -> String {
    format!("{command} >>/tmp/served 2>&1 3<&- &\necho $! >>/tmp/running; wait")
}

/// Ends what is kept, each with what it has started if it leads a group, and shows what it printed.
const STOP: &str = "for pid in $(</tmp/running); do kill -- -$pid 2>/dev/null || kill $pid 2>/dev/null; done
cat /tmp/served; rm /tmp/served /tmp/running";

/// The first of the ports that a tunnel has.
const TUNNEL_PORT: u16 = 7000;
/// How long one program may take.
const PATIENCE: Duration = Duration::from_mins(2);

/// How the two talk to each other.
#[derive(Debug)]
struct Way {
    /// What the shells of both start with.
    prepare: &'static str,
    /// What runs beside the server, and how to see that it is ready.
    beside: Option<[String; 2]>,
    /// What the client's shell goes on with.
    enter: String,
}

/// Server and client make SMC sockets, and know nothing of it.
fn over_smc(bed: &Bed, server: &Server) -> Result<String> {
    let way = Way { prepare: PRELOAD, beside: None, enter: format!("TO={}", address_of(0)) };
    let (output, carried) = with_smc(bed, || server.talk(bed, &way))?;
    server.has_carried(carried, output)
}

/// Server and client talk to netcats beside them, which talk to each other over rsockets.
fn over_rsockets(bed: &Bed, server: &Server) -> Result<String> {
    bed.put("tunnel.sh", TUNNEL)?;
    let before = bed.router.sent_bytes()?;
    let output = server.talk(bed, &server.tunnel())?;
    server.has_carried(bed.router.sent_bytes()? - before, output)
}

impl Server {
    fn tunnel(&self) -> Way {
        let Self { port, connections, .. } = self;
        let ends = format!("{} {TUNNEL_PORT} {connections}", address_of(0));
        let listen = format!("exec setsid bash /share/tunnel.sh listen {ends} TCP4:127.0.0.1:{port} 3<&-");
        let ready = format!("[ $(rdma resource show cm_id | grep -c 'state LISTEN.*:70[0-9][0-9] ') = {connections} ]");
        let enter = format!(
            "rm -rf /tmp/entered.*\n\
            socat TCP4-LISTEN:{port},bind=127.0.0.1,fork EXEC:'bash /share/tunnel.sh enter {ends}' 3<&- &\n\
            trap \"kill $!\" EXIT\nfor turn in {{1..400}}; do listens {port} && break; tick; done\nTO=127.0.0.1"
        );
        Way { prepare: "", beside: Some([listen, ready]), enter }
    }

    /// Runs both ends, the server in the first guest; what both printed.
    fn talk(&self, bed: &Bed, way: &Way) -> Result<String> {
        bed.put("servers.sh", SCRIPT)?;
        let Self { name, port, .. } = self;
        let Way { prepare, beside, enter } = way;
        let first = bed.guest(0)?;
        let serve = format!("{prepare}\n. /share/servers.sh\n{}", kept(&format!("{name}_server")));
        let mut jobs = vec![first.start_script(&serve)?];
        wait_until(first, &format!("listens {port}"))?;
        if let Some([command, ready]) = beside {
            jobs.push(first.start_script(&kept(command))?);
            wait_until(first, ready)?;
        }
        let client = format!("{prepare}\n{enter}\n. /share/servers.sh\n{name}_client 3<&- 2>&1");
        let client = bed.guest(1)?.run(&client, PATIENCE)?;
        let served = first.must(STOP)?;
        jobs.iter().try_for_each(|job| job.wait(PATIENCE).map(drop))?;
        let output = format!("server:\n{served}\nclient:\n{}", client.output);
        ensure!(client.status == 0, "status {}\n{output}", client.status);
        Ok(output)
    }

    fn has_carried(&self, bytes: u64, output: String) -> Result<String> {
        ensure!(bytes >= self.carries, "only {bytes} bytes went over the virtual NICs\n{output}");
        Ok(output)
    }
}
