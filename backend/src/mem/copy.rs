#![expect(unsafe_code, reason = "copies to and from memory that the guest changes at will")]
//! Copying to and from guest memory.
//!
//! The guest may change the bytes while we copy. That gives torn values, which nobody relies on, and
//! nothing else: no reference to guest memory is ever made, and what is copied out is checked only after it is here.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use super::Seg;

/// Where bytes come from: first our own, then a guest's.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// Headers and inline data.
    pub own: &'a [&'a [u8]],
    /// Guest memory.
    pub guest: &'a [Seg],
}

impl Source<'_> {
    /// All of it as segments, to be read from only.
    fn segs(&self) -> impl Iterator<Item = Seg> + Clone {
        let own = self.own.iter().map(|bytes| Seg { ptr: bytes.as_ptr().cast_mut(), len: bytes.len() });
        own.chain(self.guest.iter().copied())
    }

    /// The only piece that has bytes, where it is seen at once that there is just one.
    #[inline]
    fn only(&self) -> Option<Seg> {
        match (self.own, self.guest) {
            ([] | [[]], &[seg]) => Some(seg),
            (&[bytes], []) => Some(Seg { ptr: bytes.as_ptr().cast_mut(), len: bytes.len() }),
            _ => None,
        }
    }
}

/// Copies the bytes of `src` over those of `dst`, as many as the shorter of the two has. The two may overlap.
pub fn copy(src: Source<'_>, dst: &[Seg]) {
    walk(src, dst, |from, to, len| {
        // SAFETY: `walk` gives addresses inside segments, which lie in live mappings or in borrowed bytes of our own, and the
        // latter only to read from; `copy` allows overlap.
        unsafe { std::ptr::copy(from, to, len) };
    });
}

/// Like [`copy`], but the last aligned word (up to 8 bytes) becomes visible no earlier than all bytes before it.
///
/// Applications poll the last bytes of a buffer to see that an RDMA WRITE has arrived (IBA leaves it
/// open, every NIC provides it).
pub fn copy_ordered(src: Source<'_>, dst: &[Seg]) {
    // The usual case by a shorter way: one piece on each side.
    if let (Some(from), &[to]) = (src.only(), dst) {
        let len = from.len.min(to.len);
        return copy_piece_ordered(from.slice(0, len), to.slice(0, len));
    }
    let total = shorter(src, dst);
    let last = last_word_of(dst, total);
    let whole = usize::MAX;
    copy_strides(src, dst, total - last.map_or(0, |last| last.len), whole, || 0);
    end_ordered(src, total, last);
}

/// Like [`copy`] or, if `ordered`, [`copy_ordered`], but first `stride` bytes and then as many as `next` says each time, until that says 0.
/// Returns how many bytes were copied.
pub fn copy_in_strides(
    src: Source<'_>,
    dst: &[Seg],
    ordered: bool,
    stride: usize,
    next: impl FnMut() -> usize,
) -> usize {
    let total = shorter(src, dst);
    let last = if ordered { last_word_of(dst, total) } else { None };
    let body = total - last.map_or(0, |last| last.len);
    let copied = copy_strides(src, dst, body, stride, next);
    if copied < body {
        return copied;
    }
    end_ordered(src, total, last);
    total
}

/// Bytes of the side that has fewer.
fn shorter(src: Source<'_>, dst: &[Seg]) -> usize {
    src.segs().map(|seg| seg.len).sum::<usize>().min(dst.iter().map(Seg::len).sum())
}

/// The word that ends the first `total` bytes of `dst`.
fn last_word_of(dst: &[Seg], total: usize) -> Option<Seg> {
    end_of(dst, total).map(|end| end.slice(end.len - last_word(end), end.len))
}

/// Copies the last of `total` bytes, all others of which are there.
fn end_ordered(src: Source<'_>, total: usize, last: Option<Seg>) {
    let Some(last) = last else { return };
    // Only now: its cache line, last written by another core, has come with the body.
    let mut tail = [0u8; 8];
    let word = &mut tail[..last.len];
    read_at(src, total - last.len, word);
    fence(Ordering::Release);
    store_word(last, word);
}

/// The same for pieces of the same length.
#[inline]
fn copy_piece_ordered(from: Seg, to: Seg) {
    let word = last_word(to);
    let body = to.len - word;
    if body > 0 {
        // SAFETY: both segments have at least `body` bytes, in live mappings or, to be read from only, in borrowed bytes of our own;
        // `copy` allows overlap.
        unsafe { std::ptr::copy(from.ptr, to.ptr, body) };
    }
    let (from, to) = (from.slice(body, word), to.slice(body, word));
    match word {
        8 => store_word(to, &read_word::<8>(from)),
        4 => store_word(to, &read_word::<4>(from)),
        2 => store_word(to, &read_word::<2>(from)),
        1 => store_word(to, &read_word::<1>(from)),
        _ => {}
    }
}

#[inline]
fn read_word<const SIZE: usize>(seg: Seg) -> [u8; SIZE] {
    let mut word = [0; SIZE];
    read(seg, &mut word);
    word
}

/// Has the cache line at the start of a segment fetched, where the processor can be asked to.
#[inline]
pub fn prefetch(seg: Seg) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint: it reads nothing that the program sees and faults on no address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(seg.ptr.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = seg;
}

/// As [`prefetch`], of our own memory.
#[inline]
pub fn prefetch_own<T>(item: &T) {
    prefetch(Seg { ptr: std::ptr::from_ref(item).cast_mut().cast(), len: size_of::<T>() });
}

/// As [`prefetch`], to be written: another core that has the line lets go of it meanwhile.
#[inline]
pub fn prefetch_to_write(seg: Seg) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, as above; processors that do not know it take it for a NOP.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) seg.ptr, options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = seg;
}

/// Copies guest bytes at `seg` into `buf`.
///
/// # Panics
/// When `buf` is longer than the segment.
#[inline]
pub fn read(seg: Seg, buf: &mut [u8]) {
    assert!(buf.len() <= seg.len, "read beyond a segment");
    // SAFETY: the segment has at least `buf.len()` bytes in a live mapping, and `buf` is ours alone.
    unsafe { std::ptr::copy_nonoverlapping(seg.ptr, buf.as_mut_ptr(), buf.len()) };
}

/// Touches every page of some segments. The system, which was to read or write there, has found one whose memory is gone: touched by us that raises
/// the alarm, and something is in its place after that.
pub fn touch(segs: &[Seg]) {
    const PAGE: usize = 4096;
    for seg in segs {
        for offset in (0..seg.len).step_by(PAGE).chain(seg.len.checked_sub(1)) {
            let mut byte = [0];
            read(seg.slice(offset, 1), &mut byte);
            std::hint::black_box(byte);
        }
    }
}

/// Copies guest bytes into `buf`, as many as the shorter of the two has.
pub fn read_all(segs: &[Seg], buf: &mut [u8]) {
    read_at(Source { own: &[], guest: segs }, 0, buf);
}

/// Copies `bytes` to the guest at `seg`.
///
/// # Panics
/// When `bytes` are longer than the segment.
#[inline]
pub fn write(bytes: &[u8], seg: Seg) {
    assert!(bytes.len() <= seg.len, "write beyond a segment");
    // SAFETY: the segment has at least `bytes.len()` bytes in a live mapping that `bytes` (ours) is not part of.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), seg.ptr, bytes.len()) };
}

/// Bytes of the naturally aligned word (of 8, 4, 2 or 1) that ends a segment; 0 for an empty one.
#[inline]
fn last_word(seg: Seg) -> usize {
    let end = seg.ptr as usize + seg.len;
    [8, 4, 2, 1].into_iter().find(|&n| n <= seg.len && end.is_multiple_of(n)).unwrap_or(0)
}

/// The piece in which the first `total` bytes of `dst` end, up to there.
fn end_of(dst: &[Seg], total: usize) -> Option<Seg> {
    let mut left = total;
    dst.iter().find_map(|seg| {
        if left <= seg.len {
            return Some(seg.slice(0, left));
        }
        left -= seg.len;
        None
    })
}

fn read_at(src: Source<'_>, mut offset: usize, mut buf: &mut [u8]) {
    for seg in src.segs() {
        if offset >= seg.len {
            offset -= seg.len;
            continue;
        }
        let part = seg.slice(offset, buf.len());
        let (now, later) = std::mem::take(&mut buf).split_at_mut(part.len);
        read(part, now);
        buf = later;
        offset = 0;
        if buf.is_empty() {
            return;
        }
    }
}

#[inline]
#[expect(clippy::cast_ptr_alignment, reason = "`last_word` aligned it")]
fn store_word(seg: Seg, bytes: &[u8]) {
    // SAFETY: `last_word` made `seg` naturally aligned for its size, inside a live mapping; an atomic store is the access for memory
    // that others read at the same time. It is a release: the bytes before are visible first.
    unsafe {
        if let Ok(word) = <[u8; 8]>::try_from(bytes) {
            (*seg.ptr.cast::<AtomicU64>()).store(u64::from_ne_bytes(word), Ordering::Release);
        } else if let Ok(word) = <[u8; 4]>::try_from(bytes) {
            (*seg.ptr.cast::<AtomicU32>()).store(u32::from_ne_bytes(word), Ordering::Release);
        } else if let Ok(word) = <[u8; 2]>::try_from(bytes) {
            (*seg.ptr.cast::<AtomicU16>()).store(u16::from_ne_bytes(word), Ordering::Release);
        } else if let [byte] = *bytes {
            (*seg.ptr.cast::<AtomicU8>()).store(byte, Ordering::Release);
        }
    }
}

/// Copies the first `limit` bytes in strides. How many it came to.
fn copy_strides(src: Source<'_>, dst: &[Seg], limit: usize, stride: usize, mut next: impl FnMut() -> usize) -> usize {
    let (mut copied, mut room) = (0, stride.min(limit));
    walk(src, dst, |mut from, mut to, mut len| {
        while len > 0 && room > 0 {
            let now = len.min(room);
            // SAFETY: as in `copy`; `now` is not more than what is left of what `walk` offers, and so are the addresses behind it.
            (from, to) = unsafe {
                std::ptr::copy(from, to, now);
                (from.add(now), to.add(now))
            };
            (len, room, copied) = (len - now, room - now, copied + now);
            if room == 0 && copied < limit {
                room = next().min(limit - copied);
            }
        }
    });
    copied
}

/// Calls `f(from, to, len)` for the longest runs that are contiguous on both sides.
fn walk(src: Source<'_>, dst: &[Seg], mut f: impl FnMut(*const u8, *mut u8, usize)) {
    let (mut sources, mut targets) = (src.segs(), dst.iter().copied());
    let (mut from, mut to) = (sources.next(), targets.next());
    while let (Some(s), Some(t)) = (from, to) {
        let len = s.len.min(t.len);
        if len > 0 {
            f(s.ptr, t.ptr, len);
        }
        from = if len == s.len { sources.next() } else { Some(s.slice(len, usize::MAX)) };
        to = if len == t.len { targets.next() } else { Some(t.slice(len, usize::MAX)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seg(bytes: &mut [u8]) -> Seg {
        Seg { ptr: bytes.as_mut_ptr(), len: bytes.len() }
    }

    #[test]
    fn copies_across_different_splits() {
        let mut from = (0..=255u8).collect::<Vec<_>>();
        for ordered in [false, true] {
            for cut in [0, 1, 7, 100, 255, 256] {
                for skew in 0..9 {
                    let mut to = vec![0u8; 256 + skew];
                    let (a, b) = from.split_at_mut(cut);
                    let src = [seg(a), seg(b)];
                    let (c, d) = to[skew..].split_at_mut(256 - cut);
                    let dst = [seg(c), seg(d)];
                    let src = Source { own: &[], guest: &src };
                    if ordered {
                        copy_ordered(src, &dst);
                    } else {
                        copy(src, &dst);
                    }
                    assert_eq!(to[skew..], from[..], "cut {cut} skew {skew} ordered {ordered}");
                }
            }
        }
    }

    #[test]
    fn copies_one_piece_wherever_it_begins_and_ends() {
        let mut from = (1..=40u8).collect::<Vec<_>>();
        let guest = seg(&mut from);
        for (start, len) in (0..9).flat_map(|start| (0..=31).map(move |len| (start, len))) {
            for inline in [false, true] {
                let mut to = [0u8; 40];
                let dst = [seg(&mut to[start..][..len])];
                let bytes = (1..=40u8).collect::<Vec<_>>();
                let src = if inline {
                    Source { own: &[&bytes], guest: &[] }
                } else {
                    Source { own: &[&[]], guest: &[guest] }
                };
                copy_ordered(src, &dst);
                let wanted: Vec<_> = (0..40)
                    .map(|i| if (start..start + len).contains(&i) { (i - start + 1) as u8 } else { 0 })
                    .collect();
                assert_eq!(to[..], wanted[..], "{len} bytes at {start}, inline {inline}");
            }
        }
    }

    #[test]
    fn copies_no_more_than_the_shorter_side_has() {
        let (from, mut to) = (vec![1u8; 10], vec![0u8; 20]);
        copy_ordered(Source { own: &[&from], guest: &[] }, &[seg(&mut to)]);
        assert_eq!(to.iter().map(|&b| usize::from(b)).sum::<usize>(), 10);
        let (from, mut to) = (vec![1u8; 20], vec![0u8; 30]);
        copy_ordered(Source { own: &[&from], guest: &[] }, &[seg(&mut to[..10])]);
        assert_eq!(to.iter().map(|&b| usize::from(b)).sum::<usize>(), 10);
    }

    #[test]
    fn strides_end_when_they_are_told_to() {
        let mut from = (0..=255u8).collect::<Vec<_>>();
        for (ordered, cut, skew, stride, turns) in combinations() {
            let mut to = vec![0u8; 256 + skew];
            let (a, b) = from.split_at_mut(cut);
            let src = [seg(a), seg(b)];
            let (c, d) = to[skew..].split_at_mut(256 - cut);
            let dst = [seg(c), seg(d)];
            let mut left = turns;
            let next = || {
                left = left.saturating_sub(1);
                if left > 0 { 2 * stride } else { 0 }
            };
            let copied = copy_in_strides(Source { own: &[], guest: &src }, &dst, ordered, stride, next);
            let offered = stride + 2 * stride * turns.saturating_sub(1);
            let what = format!("ordered {ordered} cut {cut} skew {skew} stride {stride} turns {turns}");
            // What is left of an aligned word comes with the stride that reaches it.
            assert!(copied == 256 || copied == offered.min(256), "{copied}: {what}");
            assert!(copied <= offered + 8, "{copied}: {what}");
            assert_eq!(to[skew..skew + copied], from[..copied], "{what}");
            assert!(to[skew + copied..].iter().all(|&byte| byte == 0), "{what}");
        }
    }

    fn combinations() -> impl Iterator<Item = (bool, usize, usize, usize, usize)> {
        let more = |(ordered, cut, skew)| {
            [1, 16, 64, 100, 300]
                .into_iter()
                .flat_map(move |s| [1, 2, 3, 200].map(|turns| (ordered, cut, skew, s, turns)))
        };
        let places = [0, 1, 100, 256].into_iter().flat_map(|cut| [0, 3, 8].map(|skew| (cut, skew)));
        places.flat_map(|(cut, skew)| [false, true].map(|ordered| (ordered, cut, skew))).flat_map(more)
    }

    #[test]
    fn nothing_to_copy_is_fine() {
        let nothing = Source { own: &[], guest: &[] };
        copy(nothing, &[]);
        copy_ordered(nothing, &[]);
        let mut one = [7u8];
        copy_ordered(nothing, &[seg(&mut one)]);
        assert_eq!(one, [7]);
    }
}
