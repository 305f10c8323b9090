//! The C header and this crate describe the same bytes: every field of every structure, every number.
//!
//! The crate's own description is turned into C static assertions, which the compiler checks against the
//! driver's header and, for ring elements, against the kernel's `rdma_user_rxe.h` and `ib_user_verbs.h`.

use std::fmt::Write as _;
use std::process::Command;

use virtio_rdma::area::{self, AddressHandle, AreaKind, DoorbellLayout};
use virtio_rdma::config::{self, Config};
use virtio_rdma::ctrl::{self, *};
use virtio_rdma::event::{Event, EventType};
use virtio_rdma::ib::{Access, QpState, QpType, WcFlags, WcOpcode, WcStatus, WrOpcode};
use virtio_rdma::ring::{self, Cqe, DmaInfo, Format, RecvWqe, RegMrPart, RingHeader, SendWqe, Sge};
use virtio_rdma::{ABI_VERSION, PAGE_SIZE, VIRTIO_ID_RDMA, VIRTIO_ID_RDMA_ALT, Wire};

fn assert_eq_c(out: &mut String, left: &str, right: impl std::fmt::Display) {
    writeln!(out, "_Static_assert({left} == {right}, \"{left}\");").unwrap();
}

fn structure<T: Wire>(out: &mut String) {
    let tag = T::C_NAME;
    assert_eq_c(out, &format!("sizeof(struct {tag})"), size_of::<T>());
    for field in T::FIELDS {
        assert_eq_c(out, &format!("__builtin_offsetof(struct {tag}, {})", field.name), field.offset);
        assert_eq_c(out, &format!("sizeof(((struct {tag} *)0)->{})", field.name), field.size);
    }
    let covered: usize = T::FIELDS.iter().map(|f| f.size).sum();
    assert_eq!(covered, size_of::<T>(), "{tag} has bytes that no field names");
}

/// Ring elements: the kernel's structures have their own names and unions for some fields.
fn foreign<T: Wire>(out: &mut String, names: &[(&str, &str)]) {
    let tag = T::C_NAME;
    for field in T::FIELDS {
        let Some((_, c_name)) = names.iter().find(|(ours, _)| *ours == field.name) else {
            continue;
        };
        assert_eq_c(out, &format!("__builtin_offsetof(struct {tag}, {c_name})"), field.offset);
        assert_eq_c(out, &format!("sizeof(((struct {tag} *)0)->{c_name})"), field.size);
    }
}

fn screaming(camel: &str) -> String {
    let mut name = String::new();
    for c in camel.chars() {
        if c.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(c.to_ascii_uppercase());
    }
    name
}

fn enumeration<T: std::fmt::Debug + Copy>(out: &mut String, prefix: &str, all: &[T], wire: impl Fn(T) -> u32) {
    for value in all {
        assert_eq_c(out, &format!("{prefix}{}", screaming(&format!("{value:?}"))), wire(*value));
    }
}

fn compile(source: &str) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("check.c");
    std::fs::write(&file, source).unwrap();
    let driver = concat!(env!("CARGO_MANIFEST_DIR"), "/driver");
    let cc = Command::new("cc").args(["-fsyntax-only", "-Wall", "-Werror", "-I", driver]).arg(&file).output();
    let output = cc.expect("a C compiler is needed to compare the header: install gcc");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn structures_agree_with_the_drivers_header() {
    let mut c = String::from("#include \"virtio_rdma_abi.h\"\n");
    structure::<Config>(&mut c);
    structure::<Header>(&mut c);
    structure::<ResponseHeader>(&mut c);
    structure::<Extent>(&mut c);
    structure::<ObjectRequest>(&mut c);
    structure::<ObjectResponse>(&mut c);
    structure::<DeviceAttr>(&mut c);
    structure::<SetArea>(&mut c);
    structure::<AddGid>(&mut c);
    structure::<DelGid>(&mut c);
    structure::<RegMr>(&mut c);
    structure::<ExtendMr>(&mut c);
    structure::<ReregMr>(&mut c);
    structure::<AllocMr>(&mut c);
    structure::<AllocMw>(&mut c);
    structure::<MapPages>(&mut c);
    structure::<PageRange>(&mut c);
    structure::<RegMrPart>(&mut c);
    structure::<ResizeCq>(&mut c);
    structure::<ResizeSrq>(&mut c);
    structure::<RingDesc>(&mut c);
    structure::<CreateCq>(&mut c);
    structure::<CreateQp>(&mut c);
    structure::<CreateQpResponse>(&mut c);
    structure::<AddressVector>(&mut c);
    structure::<QpAttr>(&mut c);
    structure::<ModifyQp>(&mut c);
    structure::<CreateSrq>(&mut c);
    structure::<ModifySrq>(&mut c);
    structure::<SrqAttr>(&mut c);
    structure::<Mcast>(&mut c);
    structure::<AddressHandle>(&mut c);
    structure::<Event>(&mut c);
    compile(&c);
}

#[test]
fn numbers_agree_with_the_drivers_header() {
    let mut c = String::from("#include \"virtio_rdma_abi.h\"\n");
    for (name, value) in [
        ("VIRTIO_RDMA_ID", VIRTIO_ID_RDMA as usize),
        ("VIRTIO_RDMA_ID_ALT", VIRTIO_ID_RDMA_ALT as usize),
        ("VIRTIO_RDMA_MAGIC", config::MAGIC as usize),
        ("VIRTIO_RDMA_ABI_VERSION", ABI_VERSION as usize),
        ("VIRTIO_RDMA_PAGE_SIZE", PAGE_SIZE),
        ("VIRTIO_RDMA_CONFIG_LINK_UP", config::STATUS_LINK_UP as usize),
        ("VIRTIO_RDMA_MAX_REQUEST", MAX_REQUEST),
        ("VIRTIO_RDMA_MAX_RESPONSE", MAX_RESPONSE),
        ("VIRTIO_RDMA_CMDS_STREAM", OPCODES_STREAM as usize),
        ("VIRTIO_RDMA_NO_OBJECT", NO_OBJECT as usize),
        ("VIRTIO_RDMA_REREG_TRANS", ctrl::REREG_TRANS as usize),
        ("VIRTIO_RDMA_REREG_PD", ctrl::REREG_PD as usize),
        ("VIRTIO_RDMA_REREG_ACCESS", ctrl::REREG_ACCESS as usize),
        ("VIRTIO_RDMA_REG_DMA", ctrl::REG_DMA as usize),
        ("VIRTIO_RDMA_REG_ON_DEMAND", ctrl::REG_ON_DEMAND as usize),
        ("VIRTIO_RDMA_MAX_ON_DEMAND_PAGES", ctrl::MAX_ON_DEMAND_PAGES as usize),
        ("VIRTIO_RDMA_PAGES_WRITE", ctrl::PAGES_WRITE as usize),
        ("VIRTIO_RDMA_F_ON_DEMAND", config::F_ON_DEMAND as usize),
        ("VIRTIO_RDMA_QP_KERNEL", ctrl::QP_KERNEL as usize),
        ("VIRTIO_RDMA_MW_TYPE_1", ctrl::MW_TYPE_1 as usize),
        ("VIRTIO_RDMA_MW_TYPE_2", ctrl::MW_TYPE_2 as usize),
        ("VIRTIO_RDMA_WR_REG_MR", WrOpcode::RegMr.to_wire() as usize),
        ("VIRTIO_RDMA_WC_REG_MR", WcOpcode::RegMr.to_wire() as usize),
        ("VIRTIO_RDMA_WC_GRH", WcFlags::GRH.bits() as usize),
        ("VIRTIO_RDMA_WC_WITH_IMM", WcFlags::WITH_IMM.bits() as usize),
        ("VIRTIO_RDMA_WC_WITH_INV", WcFlags::WITH_INV.bits() as usize),
        ("VIRTIO_RDMA_DB_SLEEPING", DoorbellLayout::SLEEPING),
        ("VIRTIO_RDMA_DB_SUMMARY", DoorbellLayout::SUMMARY),
        ("VIRTIO_RDMA_ARM_NONE", area::ARM_NONE as usize),
        ("VIRTIO_RDMA_ARM_SOLICITED", area::ARM_SOLICITED as usize),
        ("VIRTIO_RDMA_ARM_NEXT", area::ARM_NEXT as usize),
        ("VIRTIO_RDMA_ARM_STRIDE", area::ARM_STRIDE),
        ("VIRTIO_RDMA_SL_ROCE_V2_IPV6", ring::SL_ROCE_V2_IPV6 as usize),
        ("VIRTIO_RDMA_SL_ROCE_V2_IPV4", ring::SL_ROCE_V2_IPV4 as usize),
        ("VIRTIO_RDMA_AH_STRIDE", area::AH_STRIDE),
        ("VIRTIO_RDMA_AH_VALID", area::AH_VALID as usize),
    ] {
        assert_eq_c(&mut c, name, value);
    }
    enumeration(&mut c, "VIRTIO_RDMA_CMD_", Opcode::ALL, |v| u32::from(v.to_wire()));
    enumeration(&mut c, "VIRTIO_RDMA_STATUS_", Status::ALL, Status::to_wire);
    enumeration(&mut c, "VIRTIO_RDMA_AREA_", AreaKind::ALL, |v| u32::from(v.to_wire()));
    enumeration(&mut c, "VIRTIO_RDMA_EVENT_", EventType::ALL, |v| u32::from(v.to_wire()));
    enumeration(&mut c, "VIRTIO_RDMA_FORMAT_", Format::ALL, |v| u32::from(v.to_wire()));
    compile(&c);
}

#[test]
fn ring_elements_agree_with_the_kernels_headers() {
    let mut c = String::from("#include <rdma/rdma_user_rxe.h>\n#include <rdma/ib_user_verbs.h>\n");
    structure::<RingHeader>(&mut c);
    structure::<Sge>(&mut c);
    foreign::<DmaInfo>(&mut c, &[("length", "length"), ("num_sge", "num_sge"), ("reserved", "reserved")]);
    foreign::<SendWqe>(
        &mut c,
        &[
            ("wr_id", "wr.wr_id"),
            ("opcode", "wr.opcode"),
            ("send_flags", "wr.send_flags"),
            ("imm_data", "wr.ex.imm_data"),
            ("wr", "wr.wr"),
            ("iova", "iova"),
        ],
    );
    foreign::<RecvWqe>(&mut c, &[("wr_id", "wr_id")]);
    foreign::<Cqe>(&mut c, &[("imm_data", "ex.imm_data")]);
    for field in Cqe::FIELDS.iter().filter(|f| f.name != "imm_data") {
        foreign::<Cqe>(&mut c, &[(field.name, field.name)]);
    }
    for (path, offset) in [
        ("struct rxe_send_wqe, dma", std::mem::offset_of!(SendWqe, dma)),
        ("struct rxe_recv_wqe, dma", std::mem::offset_of!(RecvWqe, dma)),
        ("struct rxe_dma_info, sge", size_of::<DmaInfo>()),
        ("struct rxe_queue_buf, data", size_of::<RingHeader>()),
        ("struct rxe_send_wr, wr.rdma.rkey", 24 + std::mem::offset_of!(ring::RdmaPart, rkey)),
        ("struct rxe_send_wr, wr.atomic.swap", 24 + std::mem::offset_of!(ring::AtomicPart, swap)),
        ("struct rxe_send_wr, wr.atomic.rkey", 24 + std::mem::offset_of!(ring::AtomicPart, rkey)),
        ("struct rxe_send_wr, wr.ud.remote_qkey", 24 + std::mem::offset_of!(ring::UdPart, remote_qkey)),
        ("struct rxe_send_wr, wr.ud.ah_num", 24 + std::mem::offset_of!(ring::UdPart, ah_num)),
        ("struct rxe_send_wr, wr.mw.mr_lkey", 24 + std::mem::offset_of!(ring::BindMwPart, mr_lkey)),
        ("struct rxe_send_wr, wr.mw.access", 24 + std::mem::offset_of!(ring::BindMwPart, access)),
    ] {
        assert_eq_c(&mut c, &format!("__builtin_offsetof({path})"), offset);
    }
    assert_eq_c(&mut c, "sizeof(struct rxe_send_wqe)", size_of::<SendWqe>());
    assert_eq_c(&mut c, "sizeof(struct ib_uverbs_wc)", size_of::<Cqe>());
    compile(&c);
}

#[test]
fn numbers_of_verbs_are_the_kernels() {
    let mut c = String::from("#include <rdma/ib_user_verbs.h>\n#include <rdma/ib_user_ioctl_verbs.h>\n");
    // What headers of 6.1 do not have yet (FLUSH, ATOMIC WRITE), and what none for user space has.
    let unnamed = ["Flush", "AtomicWrite", "RegMr", "Recv", "RecvRdmaWithImm", "Gsi", "FLUSH_GLOBAL"];
    let mut same = |prefix: &str, name: &str, wire: u32| {
        if !unnamed.contains(&name) {
            assert_eq_c(&mut c, &format!("{prefix}{}", screaming(name)), wire);
        }
    };
    for op in WrOpcode::ALL {
        same("IB_UVERBS_WR_", &format!("{op:?}"), op.to_wire());
    }
    for op in WcOpcode::ALL {
        same("IB_UVERBS_WC_", &format!("{op:?}"), op.to_wire());
    }
    for kind in QpType::ALL {
        same("IB_UVERBS_QPT_", &format!("{kind:?}"), kind.to_wire().into());
    }
    for (name, flag) in Access::all().iter_names().filter(|(name, _)| !unnamed.contains(name)) {
        assert_eq_c(&mut c, &format!("IB_UVERBS_ACCESS_{name}"), flag.bits());
    }
    compile(&c);
    // The kernel has no user-space header for states and statuses; these are the specification's order.
    assert_eq!(QpState::ALL.iter().map(|s| s.to_wire()).collect::<Vec<_>>(), (0..=6).collect::<Vec<_>>());
    assert_eq!(WcStatus::RnrRetryExcErr.to_wire(), 13);
}
