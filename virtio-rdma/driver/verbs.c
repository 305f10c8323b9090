// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * The verbs device: what it says of itself and its port, and the table of its operations.
 *
 * The user ABI is that of the rxe provider, found by driver id.
 */
#include <linux/log2.h>

#include <rdma/ib_addr.h>
#include <rdma/ib_cache.h>
#include <rdma/ib_mad.h>

#include "compat.h"
#include "vrdma.h"

/* What software devices say; zero is taken for an error */
#define VRDMA_NO_VENDOR	0xffffff

/* Extents of a fast registration, which lie in one allocation */
#define VRDMA_MAX_FAST_REG	512

/* A capability that is not known promises nothing */
static enum ib_atomic_cap vrdma_atomic_cap(u32 wire)
{
	return wire <= IB_ATOMIC_GLOB ? wire : IB_ATOMIC_NONE;
}

static void vrdma_take_attr(struct vrdma_dev *dev, const struct virtio_rdma_device_attr *wire)
{
	struct vrdma_attr *attr = &dev->attr;

	attr->max_mr_size = le64_to_cpu(wire->max_mr_size);
	attr->access_flags = le32_to_cpu(wire->access_flags);
	attr->max_qp = le32_to_cpu(wire->max_qp);
	attr->max_qp_wr = le32_to_cpu(wire->max_qp_wr);
	attr->max_sge = le32_to_cpu(wire->max_sge);
	attr->max_inline_data = le32_to_cpu(wire->max_inline_data);
	attr->max_cq = le32_to_cpu(wire->max_cq);
	attr->max_cqe = le32_to_cpu(wire->max_cqe);
	attr->max_mr = le32_to_cpu(wire->max_mr);
	attr->max_mw = le32_to_cpu(wire->max_mw);
	attr->max_pd = le32_to_cpu(wire->max_pd);
	attr->max_srq = le32_to_cpu(wire->max_srq);
	attr->max_mcast_grp = le32_to_cpu(wire->max_mcast_grp);
	attr->max_mcast_qp_attach = le32_to_cpu(wire->max_mcast_qp_attach);
	attr->max_ah = le32_to_cpu(wire->max_ah);
	attr->max_doorbells = le32_to_cpu(wire->max_doorbells);
	attr->max_gids = le32_to_cpu(wire->max_gids);
	attr->max_rd_atomic = le32_to_cpu(wire->max_rd_atomic);
	attr->max_fast_reg = le32_to_cpu(wire->max_fast_reg_extents);
	attr->qp_types = le32_to_cpu(wire->qp_types);
	attr->max_msg_size = le32_to_cpu(wire->max_msg_size);
	attr->atomic_cap = vrdma_atomic_cap(le32_to_cpu(wire->atomic_cap));
	attr->vendor_id = le32_to_cpu(wire->vendor_id);
}

static bool vrdma_attr_usable(const struct vrdma_attr *attr, u32 ring_formats)
{
	return (ring_formats & BIT(VIRTIO_RDMA_FORMAT_RXE)) && attr->max_qp && attr->max_cq &&
	       attr->max_pd && attr->max_sge && attr->max_qp_wr && attr->max_cqe &&
	       attr->max_ah > 1 && attr->max_gids && attr->max_doorbells &&
	       attr->max_sge <= U16_MAX && attr->max_gids <= U16_MAX;
}

int vrdma_query_attr(struct vrdma_dev *dev)
{
	struct virtio_rdma_device_attr wire;
	int ret;

	ret = vrdma_ctrl_call(dev, VIRTIO_RDMA_CMD_QUERY_DEVICE, NULL, 0, &wire, sizeof(wire));
	if (ret)
		return ret;
	vrdma_take_attr(dev, &wire);
	if (!vrdma_attr_usable(&dev->attr, le32_to_cpu(wire.ring_formats))) {
		dev_err(&dev->vdev->dev, "the device's limits leave nothing to work with\n");
		return -EINVAL;
	}
	return 0;
}

/* Rings have a power of two of slots, one of which stays empty */
static u32 vrdma_ring_limit(u32 max)
{
	return rounddown_pow_of_two(min_t(u32, max, BIT(30)) + 1) - 1;
}

static int vrdma_query_device(struct ib_device *ibdev, struct ib_device_attr *out,
			      struct ib_udata *udata)
{
	struct vrdma_dev *dev = to_vdev(ibdev);
	const struct vrdma_attr *attr = &dev->attr;

	if (udata && (udata->inlen || udata->outlen))
		return -EINVAL;
	memset(out, 0, sizeof(*out));
	out->fw_ver = (u64)VIRTIO_RDMA_ABI_VERSION << 32;
	out->sys_image_guid = ibdev->node_guid;
	out->vendor_id = attr->vendor_id ?: VRDMA_NO_VENDOR;
	out->vendor_part_id = dev->vdev->id.device;
	out->max_mr_size = attr->max_mr_size;
	out->page_size_cap = PAGE_MASK & U32_MAX;
	out->device_cap_flags = IB_DEVICE_RC_RNR_NAK_GEN | IB_DEVICE_SYS_IMAGE_GUID |
				IB_DEVICE_PORT_ACTIVE_EVENT |
				vrdma_ordering_caps(attr->access_flags);
	out->max_qp = attr->max_qp;
	out->max_qp_wr = vrdma_ring_limit(attr->max_qp_wr);
	out->max_send_sge = attr->max_sge;
	out->max_recv_sge = attr->max_sge;
	out->max_sge_rd = attr->max_sge;
	out->max_cq = attr->max_cq;
	out->max_cqe = vrdma_ring_limit(attr->max_cqe);
	out->max_mr = attr->max_mr;
	out->max_mw = attr->max_mw;
	if (attr->max_mw)
		out->device_cap_flags |= IB_DEVICE_MEM_WINDOW | IB_DEVICE_MEM_WINDOW_TYPE_2B;
	out->max_pd = attr->max_pd;
	out->max_srq = attr->max_srq;
	if (attr->max_srq) {
		out->device_cap_flags |= IB_DEVICE_SRQ_RESIZE;
		out->max_srq_wr = out->max_qp_wr;
		out->max_srq_sge = attr->max_sge;
	}
	out->max_mcast_grp = attr->max_mcast_grp;
	out->max_mcast_qp_attach = attr->max_mcast_qp_attach;
	out->max_total_mcast_qp_attach = min_t(u64, (u64)attr->max_mcast_grp *
					       attr->max_mcast_qp_attach, INT_MAX);
	out->max_ah = attr->max_ah - 1;
	out->max_qp_rd_atom = attr->max_rd_atomic;
	out->max_qp_init_rd_atom = attr->max_rd_atomic;
	out->max_res_rd_atom = min_t(u64, (u64)attr->max_rd_atomic * attr->max_qp, INT_MAX);
	out->atomic_cap = attr->atomic_cap;
	out->max_fast_reg_page_list_len = min_t(u32, attr->max_fast_reg, VRDMA_MAX_FAST_REG);
	if (attr->max_fast_reg)
		out->device_cap_flags |= IB_DEVICE_MEM_MGT_EXTENSIONS;
	vrdma_odp_query(dev, out);
	out->max_pkeys = 1;
	out->local_ca_ack_delay = 15;
	return 0;
}

struct vrdma_speed {
	u32 mbps;
	u16 speed;
	u8 width;
};

/* The first that is fast enough, for display */
static const struct vrdma_speed vrdma_speeds[] = {
	{ 2500, IB_SPEED_SDR, IB_WIDTH_1X },
	{ 5000, IB_SPEED_DDR, IB_WIDTH_1X },
	{ 10000, IB_SPEED_FDR10, IB_WIDTH_1X },
	{ 25000, IB_SPEED_EDR, IB_WIDTH_1X },
	{ 40000, IB_SPEED_FDR10, IB_WIDTH_4X },
	{ 50000, IB_SPEED_HDR, IB_WIDTH_1X },
	{ 100000, IB_SPEED_EDR, IB_WIDTH_4X },
	{ 200000, IB_SPEED_HDR, IB_WIDTH_4X },
	{ 400000, IB_SPEED_NDR, IB_WIDTH_4X },
};

static void vrdma_port_speed(u32 mbps, struct ib_port_attr *attr)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(vrdma_speeds) - 1; i++)
		if (mbps <= vrdma_speeds[i].mbps)
			break;
	attr->active_speed = vrdma_speeds[i].speed;
	attr->active_width = vrdma_speeds[i].width;
}

static int vrdma_query_port(struct ib_device *ibdev, u32 port, struct ib_port_attr *attr)
{
	struct vrdma_dev *dev = to_vdev(ibdev);
	bool enabled;

	attr->state = vrdma_port_state(dev, &enabled);
	if (attr->state == IB_PORT_ACTIVE)
		attr->phys_state = IB_PORT_PHYS_STATE_LINK_UP;
	else if (enabled)
		attr->phys_state = IB_PORT_PHYS_STATE_POLLING;
	else
		attr->phys_state = IB_PORT_PHYS_STATE_DISABLED;
	attr->max_mtu = dev->max_mtu;
	attr->active_mtu = dev->active_mtu;
	attr->gid_tbl_len = dev->attr.max_gids;
	attr->ip_gids = true;
	attr->max_msg_sz = dev->attr.max_msg_size;
	attr->pkey_tbl_len = 1;
	attr->max_vl_num = 1;
	vrdma_port_speed(dev->speed_mbps, attr);
	return 0;
}

static int vrdma_query_pkey(struct ib_device *ibdev, u32 port, u16 index, u16 *pkey)
{
	if (index)
		return -EINVAL;
	*pkey = IB_DEFAULT_PKEY_FULL;
	return 0;
}

static int vrdma_get_port_immutable(struct ib_device *ibdev, u32 port,
				    struct ib_port_immutable *immutable)
{
	struct vrdma_dev *dev = to_vdev(ibdev);

	immutable->core_cap_flags = RDMA_CORE_PORT_IBA_ROCE | RDMA_CORE_PORT_IBA_ROCE_UDP_ENCAP;
	immutable->max_mad_size = IB_MGMT_MAD_SIZE;
	immutable->gid_tbl_len = dev->attr.max_gids;
	immutable->pkey_tbl_len = 1;
	return 0;
}

static enum rdma_link_layer vrdma_get_link_layer(struct ib_device *ibdev, u32 port)
{
	return IB_LINK_LAYER_ETHERNET;
}

static void vrdma_get_fw_str(struct ib_device *ibdev, char *str)
{
	snprintf(str, IB_FW_VERSION_NAME_MAX, "%u.0.0", VIRTIO_RDMA_ABI_VERSION);
}

/* Private data will choose another user ABI than rxe's; none does yet */
static int vrdma_alloc_ucontext(struct ib_ucontext *ibuc, struct ib_udata *udata)
{
	return udata->inlen ? -EOPNOTSUPP : 0;
}

static void vrdma_dealloc_ucontext(struct ib_ucontext *ibuc)
{
}

/* Mapped rings stay what they are, memory that nobody else reads */
static void vrdma_disassociate_ucontext(struct ib_ucontext *ibuc)
{
}

static const struct ib_device_ops vrdma_ops = {
	.owner = THIS_MODULE,
	.driver_id = RDMA_DRIVER_RXE,
	.uverbs_abi_ver = VRDMA_UVERBS_ABI,

	.add_gid = vrdma_add_gid,
	.alloc_mr = vrdma_alloc_mr,
	.alloc_mw = vrdma_alloc_mw,
	.alloc_pd = vrdma_alloc_pd,
	.alloc_ucontext = vrdma_alloc_ucontext,
	.attach_mcast = vrdma_attach_mcast,
	.create_ah = vrdma_create_ah,
	.create_cq = vrdma_op_create_cq,
	.create_qp = vrdma_create_qp,
	.create_srq = vrdma_create_srq,
	.create_user_ah = vrdma_create_ah,
	.dealloc_driver = vrdma_dealloc_driver,
	.dealloc_mw = vrdma_dealloc_mw,
	.dealloc_pd = vrdma_dealloc_pd,
	.dealloc_ucontext = vrdma_dealloc_ucontext,
	.del_gid = vrdma_del_gid,
	.dereg_mr = vrdma_dereg_mr,
	.destroy_ah = vrdma_destroy_ah,
	.destroy_cq = vrdma_destroy_cq,
	.destroy_qp = vrdma_destroy_qp,
	.destroy_srq = vrdma_destroy_srq,
	.detach_mcast = vrdma_detach_mcast,
	.disassociate_ucontext = vrdma_disassociate_ucontext,
	.get_dma_mr = vrdma_get_dma_mr,
	.get_dev_fw_str = vrdma_get_fw_str,
	.get_link_layer = vrdma_get_link_layer,
	.get_netdev = vrdma_get_netdev,
	.get_port_immutable = vrdma_get_port_immutable,
	.map_mr_sg = vrdma_map_mr_sg,
	.mmap = vrdma_mmap,
	.mmap_free = vrdma_mmap_free,
	.modify_ah = vrdma_modify_ah,
	.modify_qp = vrdma_modify_qp,
	.modify_srq = vrdma_modify_srq,
	.poll_cq = vrdma_poll_cq,
	.post_recv = vrdma_post_recv,
	.post_send = vrdma_post_send,
	.post_srq_recv = vrdma_post_srq_recv,
	.query_ah = vrdma_query_ah,
	.query_device = vrdma_query_device,
	.query_pkey = vrdma_query_pkey,
	.query_port = vrdma_query_port,
	.query_qp = vrdma_query_qp,
	.query_srq = vrdma_query_srq,
	.reg_user_mr = vrdma_op_reg_user_mr,
	.req_notify_cq = vrdma_req_notify_cq,
	.rereg_user_mr = vrdma_rereg_user_mr,
	.resize_user_cq = vrdma_op_resize_cq,

	INIT_RDMA_OBJ_SIZE(ib_ah, vrdma_ah, ibah),
	INIT_RDMA_OBJ_SIZE(ib_cq, vrdma_cq, ibcq),
	INIT_RDMA_OBJ_SIZE(ib_mw, vrdma_mw, ibmw),
	INIT_RDMA_OBJ_SIZE(ib_pd, vrdma_pd, ibpd),
	INIT_RDMA_OBJ_SIZE(ib_qp, vrdma_qp, ibqp),
	INIT_RDMA_OBJ_SIZE(ib_srq, vrdma_srq, ibsrq),
	INIT_RDMA_OBJ_SIZE(ib_ucontext, vrdma_ucontext, ibuc),
};

void vrdma_set_ops(struct vrdma_dev *dev)
{
	struct ib_device *ibdev = &dev->ibdev;

	strscpy(ibdev->node_desc, "Freeflow virtio RDMA", sizeof(ibdev->node_desc));
	ibdev->node_type = RDMA_NODE_IB_CA;
	ibdev->phys_port_cnt = 1;
	ibdev->num_comp_vectors = dev->num_eventqs;
	ibdev->uverbs_cmd_mask |= BIT_ULL(IB_USER_VERBS_CMD_POST_SEND) |
				  BIT_ULL(IB_USER_VERBS_CMD_REQ_NOTIFY_CQ);
	ib_set_device_ops(ibdev, &vrdma_ops);
	vrdma_odp_init(dev);
	vrdma_keep_name(ibdev);
}
