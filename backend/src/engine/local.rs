//! Work requests that stay on this side: windows are bound, regions registered, both invalidated (IBA 10.6.6.2, 10.6.5).
//!
//! Taking access away is complete only when no worker uses it any more. A worker must not wait for another, which might be waiting for
//! it: the work request stays at the head of its queue, and is looked at again, until every quantum that was under way at the change has
//! ended ([`Grace`]). The worker's own quantum does not count. It forgets what it had looked up, and requests of its other QPs that are
//! half done look their keys up again.

use virtio_rdma::ctrl::Extent;
use virtio_rdma::ib::{QpType, WcStatus};
use zerocopy::IntoBytes;

use super::complete::Step;
use super::context::Context;
use super::cost;
use super::job::Job;
use crate::key_table::{Actor, ChangeError, Registration};
use crate::mr::{Layout, LayoutError, check_access, check_range};
use crate::nic::Nic;
use crate::qp::Qp;
use crate::wqe::{FastReg, LocalOp};

/// Why a fast registration, or a change of another key, was refused.
#[derive(Debug, thiserror::Error)]
enum RegisterError {
    #[error("invalid {0}")]
    Value(&'static str),
    #[error("invalid extents: {0}")]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Change(#[from] ChangeError),
}

/// Executes it, or waits for the end of what it took away.
pub(super) fn step(ctx: &mut Context, nic: &Nic, qp: &Qp, job: &mut Job, op: LocalOp) -> Step {
    if let Some(grace) = &job.grace {
        return if ctx.engine.quiesce().is_over(grace) { Step::Done } else { Step::Paused };
    }
    let actor = Actor { qpn: qp.id.qpn, pdn: qp.id.pdn };
    let only_rc = !matches!(op, LocalOp::Bind(_));
    if only_rc && qp.id.kind != QpType::Rc {
        return Step::Failed(WcStatus::LocQpOpErr);
    }
    let changed = match op {
        LocalOp::Bind(bind) => nic
            .keys
            .bind(actor, &bind)
            .map(|old| old.map(|mr| mr.key))
            .map_err(|e| refused(qp, &e.into(), WcStatus::MwBindErr)),
        LocalOp::Invalidate(key) => {
            let old = nic.keys.invalidate(actor, key);
            old.map(|old| old.map(|mr| mr.key)).map_err(|e| refused(qp, &e.into(), WcStatus::LocQpOpErr))
        }
        LocalOp::Register(args) => match register(nic, actor, &args) {
            Ok(pieces) => {
                ctx.charge(cost::LOOKUP * pieces as u64);
                Ok(None)
            }
            Err(error) => {
                // It may have to be tried again, and looks all of them up each time.
                ctx.charge(cost::LOOKUP * job.wqe.lookups() as u64);
                Err(refused(qp, &error, WcStatus::LocQpOpErr))
            }
        },
    };
    match changed {
        Ok(None) => Step::Done,
        Ok(Some(old)) => {
            job.grace = Some(ctx.forget_key(nic, old));
            step(ctx, nic, qp, job, op)
        }
        Err(step) => step,
    }
}

/// It fails, unless it only has to be tried again.
fn refused(qp: &Qp, error: &RegisterError, status: WcStatus) -> Step {
    if matches!(error, RegisterError::Change(ChangeError::Busy)) {
        return Step::Paused;
    }
    log::debug!("QP {:#x}: {error}", qp.id.qpn);
    Step::Failed(status)
}

/// Gives a region memory; in how many pieces. The table of guest memory cannot change meanwhile: a change afterwards finds the region.
fn register(nic: &Nic, actor: Actor, args: &FastReg) -> Result<usize, RegisterError> {
    let access = check_access(args.access).map_err(RegisterError::Value)?;
    check_range(access, args.iova, args.length).map_err(RegisterError::Value)?;
    let map = nic.map.read();
    let most = nic.config.profile.max_fast_reg_extents;
    if args.num_extents > most {
        return Err(RegisterError::Value("number of extents"));
    }
    let mut raw = vec![Extent::default(); args.num_extents as usize];
    if !map.read(args.extents, raw.as_mut_bytes()) {
        return Err(RegisterError::Value("address of the extents"));
    }
    let extents: Vec<_> = raw.iter().map(|e| (e.addr.get(), e.len.get())).collect();
    let mut layout = Layout::default();
    let pieces = layout.append(&map, &extents, args.length, most as usize)?;
    if layout.length() != args.length {
        return Err(RegisterError::Value("length of the extents"));
    }
    let registration = Registration { key: args.key, access, iova: args.iova, layout, extents: pieces };
    nic.keys.register(actor, registration)?;
    Ok(pieces)
}
