//! `LD_PRELOAD=libfreeflow_smc.so program`: TCP sockets of the program become `AF_SMC` sockets.
//!
//! The kernel does the rest: an SMC socket agrees with its peer, while it connects over TCP, whether both can use the virtual
//! RDMA NIC (SMC-R, RFC 7609), and is a TCP socket if not. Where the kernel has no SMC, sockets are made as the program asked. Everything
//! but the making of a socket is left alone: addresses, options and all other calls are those of TCP.

#![expect(unsafe_code, reason = "it stands in for a function of the C library")]

use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

/// Address family of SMC sockets; their addresses are those of TCP.
const AF_SMC: c_int = 43;

/// `SMCPROTO_SMC` and `SMCPROTO_SMC6` of `linux/smc.h`: protocols of `AF_SMC`.
const SMC_OVER_IPV4: c_int = 0;
const SMC_OVER_IPV6: c_int = 1;

/// Flags that share the argument with a socket's type.
const FLAGS: c_int = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;

type Socket = unsafe extern "C" fn(c_int, c_int, c_int) -> c_int;

/// The protocol of `AF_SMC` that can stand for such a socket, if it is one of TCP.
fn smc_protocol(domain: c_int, kind: c_int, protocol: c_int) -> Option<c_int> {
    let tcp = kind & !FLAGS == libc::SOCK_STREAM && matches!(protocol, 0 | libc::IPPROTO_TCP);
    match domain {
        libc::AF_INET if tcp => Some(SMC_OVER_IPV4),
        libc::AF_INET6 if tcp => Some(SMC_OVER_IPV6),
        _ => None,
    }
}

/// `socket()` of whoever comes after us, in the end the C library.
fn next_socket() -> Option<Socket> {
    static NEXT: OnceLock<Option<Socket>> = OnceLock::new();
    const NAME: *const c_char = c"socket".as_ptr();
    *NEXT.get_or_init(|| {
        // SAFETY: `NAME` is a string of C. What is found under it is null or a function with the prototype of `socket`, which is what
        // `Option<Socket>` stands for.
        unsafe { std::mem::transmute::<*mut c_void, Option<Socket>>(libc::dlsym(libc::RTLD_NEXT, NAME)) }
    })
}

fn make(domain: c_int, kind: c_int, protocol: c_int) -> c_int {
    let make = |domain, protocol| match next_socket() {
        // SAFETY: it takes any numbers.
        Some(socket) => unsafe { socket(domain, kind, protocol) },
        // SAFETY: the system call takes any numbers.
        None => unsafe { libc::syscall(libc::SYS_socket, domain, kind, protocol) as c_int },
    };
    if let Some(smc) = smc_protocol(domain, kind, protocol) {
        let fd = make(AF_SMC, smc);
        if fd >= 0 {
            return fd;
        }
    }
    make(domain, protocol)
}

/// `socket()` as the program sees it.
#[unsafe(no_mangle)]
pub extern "C" fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int {
    make(domain, kind, protocol)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_tcp_are_meant() {
        for kind in [libc::SOCK_STREAM, libc::SOCK_STREAM | FLAGS] {
            for protocol in [0, libc::IPPROTO_TCP] {
                assert_eq!(smc_protocol(libc::AF_INET, kind, protocol), Some(SMC_OVER_IPV4));
                assert_eq!(smc_protocol(libc::AF_INET6, kind, protocol), Some(SMC_OVER_IPV6));
            }
        }
    }

    #[test]
    fn other_sockets_are_left_alone() {
        assert_eq!(smc_protocol(libc::AF_INET, libc::SOCK_DGRAM, 0), None);
        assert_eq!(smc_protocol(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_TCP), None);
        assert_eq!(smc_protocol(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_SCTP), None);
        assert_eq!(smc_protocol(libc::AF_UNIX, libc::SOCK_STREAM, 0), None);
        assert_eq!(smc_protocol(AF_SMC, libc::SOCK_STREAM, 0), None);
        assert_eq!(smc_protocol(libc::AF_NETLINK, libc::SOCK_RAW, 0), None);
    }
}
