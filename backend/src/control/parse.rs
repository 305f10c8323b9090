//! Requests of the control queue: from bytes to typed commands. After this only typed values travel.

use virtio_rdma::area::AreaKind;
use virtio_rdma::ctrl::{
    AddGid, AllocMr, AllocMw, CreateCq, CreateQp, CreateQpResponse, CreateSrq, DelGid, DeviceAttr, ExtendMr, Extent,
    Header, MAX_REQUEST, MapPages, Mcast, ModifyQp, ModifySrq, ObjectRequest, ObjectResponse, Opcode, PageRange,
    QpAttr, RegMr, ReregMr, ResizeCq, ResizeSrq, SetArea, SrqAttr,
};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::Refusal;

/// Guest-physical address and length, not looked up yet.
pub type RawExtent = (u64, u64);

/// A command with its arguments. Lengths and reserved fields of the envelope are checked; numbers inside are not.
#[derive(Debug)]
pub enum Command {
    /// `RESET`
    Reset,
    /// `QUERY_DEVICE`
    QueryDevice,
    /// `SET_AREA`
    SetArea(AreaKind, usize, Vec<RawExtent>),
    /// `ADD_GID`
    AddGid(AddGid),
    /// `DEL_GID`
    DelGid(DelGid),
    /// `ALLOC_PD`
    AllocPd,
    /// `DEALLOC_PD`
    DeallocPd(u32),
    /// `REG_MR`
    RegMr(RegMr, Vec<RawExtent>),
    /// `EXTEND_MR`
    ExtendMr(u32, Vec<RawExtent>),
    /// `REREG_MR`
    ReregMr(ReregMr, Vec<RawExtent>),
    /// `DEREG_MR`
    DeregMr(u32),
    /// `ALLOC_MR`
    AllocMr(AllocMr),
    /// `MAP_PAGES`
    MapPages(MapPages, Vec<RawExtent>),
    /// `UNMAP_PAGES`
    UnmapPages(PageRange),
    /// `DENY_PAGES`
    DenyPages(PageRange),
    /// `CREATE_CQ`
    CreateCq(CreateCq, Vec<RawExtent>),
    /// `DESTROY_CQ`
    DestroyCq(u32),
    /// `RESIZE_CQ`
    ResizeCq(ResizeCq, Vec<RawExtent>),
    /// `CREATE_QP`: extents of the send ring, then of the receive ring.
    CreateQp(CreateQp, Vec<RawExtent>, Vec<RawExtent>),
    /// `MODIFY_QP`
    ModifyQp(ModifyQp),
    /// `QUERY_QP`
    QueryQp(u32),
    /// `DESTROY_QP`
    DestroyQp(u32),
    /// `CREATE_SRQ`
    CreateSrq(CreateSrq, Vec<RawExtent>),
    /// `MODIFY_SRQ`
    ModifySrq(ModifySrq),
    /// `QUERY_SRQ`
    QuerySrq(u32),
    /// `DESTROY_SRQ`
    DestroySrq(u32),
    /// `RESIZE_SRQ`
    ResizeSrq(ResizeSrq, Vec<RawExtent>),
    /// `ALLOC_MW`
    AllocMw(AllocMw),
    /// `DEALLOC_MW`
    DeallocMw(u32),
    /// `ATTACH_MCAST`
    AttachMcast(Mcast),
    /// `DETACH_MCAST`
    DetachMcast(Mcast),
}

impl Command {
    /// Parses a request.
    ///
    /// # Errors
    /// When its length does not agree with what it says of itself, or the command is unknown.
    pub fn parse(request: &[u8]) -> Result<Self, Refusal> {
        if request.len() > MAX_REQUEST {
            return Err(Refusal::Length);
        }
        let (header, body) = Header::read_from_prefix(request).map_err(|_| Refusal::Length)?;
        if header.length.get() as usize != request.len() {
            return Err(Refusal::Length);
        }
        if header.flags.get() != 0 {
            return Err(Refusal::Reserved);
        }
        let opcode = Opcode::from_wire(header.opcode.get()).ok_or(Refusal::UnknownCommand(header.opcode.get()))?;
        let mut body = Body(body);
        let command = body.command(opcode)?;
        if body.0.is_empty() { Ok(command) } else { Err(Refusal::Length) }
    }
}

impl Command {
    /// Bytes of the response after its header.
    pub fn response_size(&self) -> usize {
        match self {
            Self::QueryDevice => size_of::<DeviceAttr>(),
            Self::AllocPd
            | Self::RegMr(..)
            | Self::AllocMr(_)
            | Self::CreateCq(..)
            | Self::CreateSrq(..)
            | Self::AllocMw(_) => size_of::<ObjectResponse>(),
            Self::CreateQp(..) => size_of::<CreateQpResponse>(),
            Self::QueryQp(_) => size_of::<QpAttr>(),
            Self::QuerySrq(_) => size_of::<SrqAttr>(),
            _ => 0,
        }
    }
}

/// What is left of a request.
struct Body<'a>(&'a [u8]);

impl Body<'_> {
    fn command(&mut self, opcode: Opcode) -> Result<Command, Refusal> {
        Ok(match opcode {
            Opcode::Reset => Command::Reset,
            Opcode::QueryDevice => Command::QueryDevice,
            Opcode::SetArea => self.set_area()?,
            Opcode::AddGid => Command::AddGid(self.take()?),
            Opcode::DelGid => Command::DelGid(self.take()?),
            Opcode::AllocPd => Command::AllocPd,
            Opcode::DeallocPd => Command::DeallocPd(self.object()?),
            Opcode::RegMr => {
                let args: RegMr = self.take()?;
                Command::RegMr(args, self.extents(args.num_extents.get())?)
            }
            Opcode::ExtendMr => {
                let args: ExtendMr = self.take()?;
                Command::ExtendMr(args.key.get(), self.extents(args.num_extents.get())?)
            }
            Opcode::ReregMr => {
                let args: ReregMr = self.take()?;
                Command::ReregMr(args, self.extents(args.num_extents.get())?)
            }
            Opcode::DeregMr => Command::DeregMr(self.object()?),
            Opcode::AllocMr => Command::AllocMr(self.take()?),
            Opcode::MapPages => {
                let args: MapPages = self.take()?;
                Command::MapPages(args, self.extents(args.num_extents.get())?)
            }
            Opcode::UnmapPages => Command::UnmapPages(self.take()?),
            Opcode::DenyPages => Command::DenyPages(self.take()?),
            Opcode::CreateCq => {
                let args: CreateCq = self.take()?;
                Command::CreateCq(args, self.extents(args.ring.num_extents.get())?)
            }
            Opcode::DestroyCq => Command::DestroyCq(self.object()?),
            Opcode::ResizeCq => {
                let args: ResizeCq = self.take()?;
                Command::ResizeCq(args, self.extents(args.ring.num_extents.get())?)
            }
            Opcode::CreateQp => {
                let args: CreateQp = self.take()?;
                let sq = self.extents(args.sq.num_extents.get())?;
                Command::CreateQp(args, sq, self.extents(args.rq.num_extents.get())?)
            }
            Opcode::ModifyQp => Command::ModifyQp(self.take()?),
            Opcode::QueryQp => Command::QueryQp(self.object()?),
            Opcode::DestroyQp => Command::DestroyQp(self.object()?),
            Opcode::CreateSrq => {
                let args: CreateSrq = self.take()?;
                Command::CreateSrq(args, self.extents(args.ring.num_extents.get())?)
            }
            Opcode::ModifySrq => Command::ModifySrq(self.take()?),
            Opcode::QuerySrq => Command::QuerySrq(self.object()?),
            Opcode::DestroySrq => Command::DestroySrq(self.object()?),
            Opcode::ResizeSrq => {
                let args: ResizeSrq = self.take()?;
                Command::ResizeSrq(args, self.extents(args.ring.num_extents.get())?)
            }
            Opcode::AllocMw => Command::AllocMw(self.take()?),
            Opcode::DeallocMw => Command::DeallocMw(self.object()?),
            Opcode::AttachMcast => Command::AttachMcast(self.take()?),
            Opcode::DetachMcast => Command::DetachMcast(self.take()?),
        })
    }

    fn set_area(&mut self) -> Result<Command, Refusal> {
        let args: SetArea = self.take()?;
        let kind = AreaKind::from_wire(args.kind.get()).ok_or(Refusal::Value("area kind"))?;
        Ok(Command::SetArea(kind, args.index.get().into(), self.extents(args.num_extents.get())?))
    }

    fn take<T: FromBytes + KnownLayout + Immutable + Unaligned>(&mut self) -> Result<T, Refusal> {
        let (value, rest) = T::read_from_prefix(self.0).map_err(|_| Refusal::Length)?;
        self.0 = rest;
        Ok(value)
    }

    fn object(&mut self) -> Result<u32, Refusal> {
        let request: ObjectRequest = self.take()?;
        if request.reserved.get() == 0 { Ok(request.number.get()) } else { Err(Refusal::Reserved) }
    }

    fn extents(&mut self, count: u32) -> Result<Vec<RawExtent>, Refusal> {
        if self.0.len() / size_of::<Extent>() < count as usize {
            return Err(Refusal::Length);
        }
        (0..count).map(|_| self.take::<Extent>().map(|e| (e.addr.get(), e.len.get()))).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use virtio_rdma::ctrl::Status;
    use zerocopy::IntoBytes;

    use super::*;

    fn request(opcode: Opcode, body: &[u8]) -> Vec<u8> {
        let length = (size_of::<Header>() + body.len()) as u32;
        let header = Header { opcode: opcode.to_wire().into(), length: length.into(), ..Header::default() };
        [header.as_bytes(), body].concat()
    }

    fn refused(bytes: &[u8]) -> Status {
        Command::parse(bytes).expect_err("accepted").status()
    }

    #[test]
    fn a_request_that_is_cut_short_or_too_long_is_refused_at_every_length() {
        let args = RegMr { num_extents: 2.into(), ..RegMr::default() };
        let body = [args.as_bytes(), &[0; 32]].concat();
        let whole = request(Opcode::RegMr, &body);
        assert!(matches!(Command::parse(&whole), Ok(Command::RegMr(_, extents)) if extents.len() == 2));
        for len in 0..whole.len() {
            assert_eq!(refused(&whole[..len]), Status::Invalid, "{len} bytes");
        }
        assert_eq!(refused(&request(Opcode::RegMr, &[&body[..], &[0]].concat())), Status::Invalid);
        assert_eq!(refused(&vec![0; MAX_REQUEST + 1]), Status::Invalid);
    }

    #[test]
    fn an_extent_count_that_the_request_does_not_hold_is_refused() {
        let args = RegMr { num_extents: u32::MAX.into(), ..RegMr::default() };
        assert_eq!(refused(&request(Opcode::RegMr, args.as_bytes())), Status::Invalid);
    }

    #[test]
    fn unknown_commands_are_told_apart_from_malformed_ones() {
        let mut bytes = request(Opcode::AllocPd, &[]);
        for unknown in [0u16, 0x0105, 0x0600, 0xffff] {
            bytes[..2].copy_from_slice(&unknown.to_le_bytes());
            assert_eq!(refused(&bytes), Status::Unsupported);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256), opcode in 0..Opcode::ALL.len()) {
            let _ = Command::parse(&bytes);
            let _ = Command::parse(&request(Opcode::ALL[opcode], &bytes));
        }
    }
}
