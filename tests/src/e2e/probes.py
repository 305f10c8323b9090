#!/usr/bin/env python3
"""Tries what a virtual NIC does not offer (docs/verbs.md): one line `NAME ERRNO` for each attempt.

Usage: probes.py DEVICE
"""

import ctypes
import errno
import os
import sys

import pyverbs.enums as e
from pyverbs.addr import AH, AHAttr, GlobalRoute
from pyverbs.cq import CQ, CQEX, CqInitAttrEx
from pyverbs.device import Context
from pyverbs.flow import Flow, FlowAttr
from pyverbs.mr import MR
from pyverbs.pd import PD, ParentDomain, ParentDomainInitAttr
from pyverbs.pyverbs_error import PyverbsError, PyverbsRDMAError
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.srq import SRQ, SrqInitAttrEx
from pyverbs.wr import SGE
from pyverbs.wq import WQ, WQInitAttr
from pyverbs.xrcd import XRCD, XRCDInitAttr

PAGE = 4096


class Probes:
    """Each method is an attempt that must fail."""

    def __init__(self, device):
        self._device = device
        self._ctx = Context(name=device)
        self._pd = PD(self._ctx)
        self._cq = CQ(self._ctx, 16)

    def _qp(self, kind, **more):
        init = QPInitAttr(qp_type=kind, scq=self._cq, rcq=self._cq, cap=QPCap(max_send_wr=4, max_recv_wr=4), **more)
        return QP(self._pd, init)

    def _mr(self, access=e.IBV_ACCESS_LOCAL_WRITE):
        return MR(self._pd, PAGE, access)

    def xrcd(self):
        mask = e.IBV_XRCD_INIT_ATTR_FD | e.IBV_XRCD_INIT_ATTR_OFLAGS
        XRCD(self._ctx, XRCDInitAttr(mask, os.O_CREAT, -1))

    def xrc_qp(self):
        self._qp(e.IBV_QPT_XRC_SEND)

    def raw_packet_qp(self):
        self._qp(e.IBV_QPT_RAW_PACKET)

    def too_many_work_requests(self):
        limit = self._ctx.query_device().max_qp_wr
        init = QPInitAttr(qp_type=e.IBV_QPT_RC, scq=self._cq, rcq=self._cq, cap=QPCap(max_send_wr=limit + 1))
        QP(self._pd, init)

    def too_many_completions(self):
        CQ(self._ctx, self._ctx.query_device().max_cqe + 1)

    def flow(self):
        qp = self._qp(e.IBV_QPT_UD)
        Flow(qp, FlowAttr())

    def wq(self):
        WQ(self._ctx, WQInitAttr(wq_context=None, wq_pd=self._pd, wq_cq=self._cq))

    def parent_domain(self):
        ParentDomain(self._ctx, attr=ParentDomainInitAttr(pd=self._pd))

    def implicit_on_demand(self):
        MR(self._pd, 0, e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_ON_DEMAND, implicit=True)

    def advise_mr(self):
        mr = self._mr(e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_ON_DEMAND)
        self._pd.advise_mr(e._IBV_ADVISE_MR_ADVICE_PREFETCH, 0, [SGE(mr.buf, 64, mr.lkey)])

    def rereg_mr(self):
        self._mr().rereg(e.IBV_REREG_MR_CHANGE_ACCESS, access=e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_READ)

    def xrc_srq(self):
        attr = SrqInitAttrEx(max_wr=4, max_sge=1)
        attr.comp_mask = e.IBV_SRQ_INIT_ATTR_TYPE | e.IBV_SRQ_INIT_ATTR_PD | e.IBV_SRQ_INIT_ATTR_CQ
        attr.srq_type, attr.pd, attr.cq = e.IBV_SRQT_XRC, self._pd, self._cq
        SRQ(self._ctx, attr)

    def timestamps(self):
        attr = CqInitAttrEx(cqe=16, wc_flags=e.IBV_WC_EX_WITH_COMPLETION_TIMESTAMP)
        CQEX(self._ctx, attr)

    def alternate_path(self):
        qp = self._qp(e.IBV_QPT_RC)
        init = QPAttr(qp_state=e.IBV_QPS_INIT, port_num=1)
        init.qp_access_flags = 0
        qp.to_init(init)
        gid = self._ctx.query_gid(1, 0)
        path = AHAttr(gr=GlobalRoute(dgid=gid, sgid_index=0), is_global=1, port_num=1)
        ready = QPAttr(qp_state=e.IBV_QPS_RTR, port_num=1)
        ready.path_mtu, ready.dest_qp_num, ready.rq_psn = e.IBV_MTU_1024, qp.qp_num, 0
        ready.max_dest_rd_atomic, ready.min_rnr_timer, ready.ah_attr = 1, 12, path
        ready.alt_ah_attr, ready.alt_port_num, ready.alt_timeout = path, 1, 14
        mask = (e.IBV_QP_STATE | e.IBV_QP_AV | e.IBV_QP_PATH_MTU | e.IBV_QP_DEST_QPN | e.IBV_QP_RQ_PSN |
                e.IBV_QP_MAX_DEST_RD_ATOMIC | e.IBV_QP_MIN_RNR_TIMER | e.IBV_QP_ALT_PATH)
        qp.modify(ready, mask)

    def ah_without_grh(self):
        AH(self._pd, attr=AHAttr(port_num=1, is_global=0, dlid=1))

    def dmabuf_mr(self):
        Library(self._device).dmabuf_mr()

    def special_qp_for_processes(self):
        self._qp(1)


class Library:
    """libibverbs itself, for what pyverbs has no name for."""

    def __init__(self, device):
        self._lib = ctypes.CDLL('libibverbs.so.1', use_errno=True)
        for name in ('ibv_get_device_list', 'ibv_open_device', 'ibv_alloc_pd', 'ibv_reg_dmabuf_mr'):
            getattr(self._lib, name).restype = ctypes.c_void_p
        self._lib.ibv_get_device_name.restype = ctypes.c_char_p
        devices = ctypes.cast(self._lib.ibv_get_device_list(None), ctypes.POINTER(ctypes.c_void_p))
        found = next(device_ for device_ in iter_until_null(devices)
                     if self._lib.ibv_get_device_name(ctypes.c_void_p(device_)) == device.encode())
        self._pd = self._lib.ibv_alloc_pd(ctypes.c_void_p(self._lib.ibv_open_device(ctypes.c_void_p(found))))

    def dmabuf_mr(self):
        fd = os.memfd_create('memory')
        os.truncate(fd, PAGE)
        mr = self._lib.ibv_reg_dmabuf_mr(ctypes.c_void_p(self._pd), ctypes.c_uint64(0), ctypes.c_size_t(PAGE),
                                         ctypes.c_uint64(0), fd, e.IBV_ACCESS_LOCAL_WRITE)
        if not mr:
            raise OSError(ctypes.get_errno(), 'ibv_reg_dmabuf_mr')


def iter_until_null(pointers):
    index = 0
    while pointers[index]:
        yield pointers[index]
        index += 1


def name_of(number):
    # One number, of whose two names Python takes the other.
    return 'EOPNOTSUPP' if number == errno.EOPNOTSUPP else errno.errorcode.get(number, str(number))


def attempt(probe):
    """The error's name."""
    try:
        probe()
        return 'none'
    except PyverbsRDMAError as error:
        return name_of(error.error_code)
    except OSError as error:
        return name_of(error.errno)
    except PyverbsError as error:
        return str(error).replace('\n', ' ')


def main():
    probes = Probes(sys.argv[1])
    for name in sorted(name for name in vars(Probes) if not name.startswith('_')):
        print(name, attempt(getattr(probes, name)), flush=True)


main()
