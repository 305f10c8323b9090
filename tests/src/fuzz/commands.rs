//! Control commands as bytes.

use std::cell::RefCell;

use virtio_rdma::ctrl::{Header, Opcode, ResponseHeader, Status};
use virtio_rdma::zerocopy::{FromBytes, IntoBytes};

use super::{Input, bed, limits, start_over};
use crate::stepped::Stepped;

thread_local! {
    static BED: RefCell<Stepped> = RefCell::new(bed());
}

/// Sends commands to the device of the first guest. Each is, in the input: what kind of header; the length of the body; the
/// body; where in it numbers of existing objects go; room for the answer.
pub fn commands(data: &[u8]) {
    BED.with_borrow_mut(|bed| {
        start_over(bed, 0, &bed.guests[0].clone());
        let (mut input, mut numbers) = (Input(data), Vec::new());
        while !input.is_empty() {
            let request = request(&mut input, &numbers);
            let room = usize::from(input.byte()) * 4;
            let answer = bed.nic(0).execute(&request, room);
            check(&answer, room);
            numbers.extend(number_in(&answer));
            check_quotas(bed);
            bed.step();
        }
    });
}

/// The commands, later ones last: inputs that were kept go on meaning what they did.
fn opcodes() -> impl Iterator<Item = Opcode> {
    const LATER: [Opcode; 3] = [Opcode::MapPages, Opcode::UnmapPages, Opcode::DenyPages];
    Opcode::ALL.iter().copied().filter(|opcode| !LATER.contains(opcode)).chain(LATER)
}

fn request(input: &mut Input<'_>, numbers: &[u32]) -> Vec<u8> {
    let kind = input.byte();
    let len = usize::from(input.byte()) * 4;
    let mut body = input.take(len).to_vec();
    for _ in 0..input.byte() & 3 {
        let (at, which) = (usize::from(input.byte()) * 4, usize::from(input.byte()));
        if let (Some(word), false) = (body.get_mut(at..at + 4), numbers.is_empty()) {
            word.copy_from_slice(&numbers[which % numbers.len()].to_le_bytes());
        }
    }
    let Some(opcode) = opcodes().nth(kind.into()) else {
        // As it is, without a header of ours.
        return body;
    };
    let length = size_of::<Header>() + body.len();
    let header = Header { opcode: opcode.to_wire().into(), flags: 0.into(), length: (length as u32).into() };
    [header.as_bytes(), &body].concat()
}

fn check(answer: &[u8], room: usize) {
    assert!(answer.len() <= room, "{} bytes for {room}", answer.len());
    let Ok((header, rest)) = ResponseHeader::read_from_prefix(answer) else {
        assert!(answer.is_empty() && room < size_of::<ResponseHeader>(), "half an answer");
        return;
    };
    let status = Status::from_wire(header.status.get()).expect("a status that exists");
    assert_eq!(header.length.get() as usize, answer.len());
    assert!(status == Status::Ok || rest.is_empty(), "an error with an answer");
}

/// The number of an object that was created: the first word of the answer.
fn number_in(answer: &[u8]) -> Option<u32> {
    let word = answer.get(size_of::<ResponseHeader>()..)?.first_chunk()?;
    Some(u32::from_le_bytes(*word))
}

fn check_quotas(bed: &Stepped) {
    let (limits, [pds, mrs, cqs, qps]) = (limits(), bed.nic(0).counts());
    assert!(pds <= limits.max_pd as usize && cqs <= limits.max_cq as usize && qps <= limits.max_qp as usize);
    assert!(mrs <= limits.max_mr as usize);
}
