//! Objects by small numbers that are used again: a number is found, taken and given back in constant time, however many there are.

/// Objects, each at the number that was free when it came.
#[derive(Debug)]
pub struct Slots<T> {
    entries: Vec<Option<T>>,
    /// Numbers of entries without an object.
    free: Vec<u32>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slots<T> {
    /// The number that the next object gets, if there is one below `max`.
    pub fn vacant(&self, max: u32) -> Option<u32> {
        let next = self.free.last().copied().unwrap_or(self.entries.len() as u32);
        (next < max).then_some(next)
    }

    /// Puts an object in at the number that [`vacant`](Self::vacant) says.
    pub fn insert(&mut self, object: T) -> u32 {
        if let Some(number) = self.free.pop() {
            self.entries[number as usize] = Some(object);
            return number;
        }
        self.entries.push(Some(object));
        self.entries.len() as u32 - 1
    }

    /// Takes an object out; its number is free then.
    pub fn remove(&mut self, number: u32) -> Option<T> {
        let object = self.entries.get_mut(number as usize)?.take()?;
        self.free.push(number);
        Some(object)
    }

    /// The object of this number.
    #[inline]
    pub fn get(&self, number: u32) -> Option<&T> {
        self.entries.get(number as usize)?.as_ref()
    }

    /// How many objects there are.
    pub fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All objects.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.entries.iter().flatten()
    }

    /// Takes all objects out and starts again at number 0.
    pub fn take_all(&mut self) -> impl Iterator<Item = T> + use<T> {
        std::mem::take(self).entries.into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_used_again_and_never_twice_at_once() {
        let mut slots = Slots::default();
        assert_eq!((0..5).map(|n| slots.insert(n)).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        assert_eq!((slots.remove(1), slots.remove(3)), (Some(1), Some(3)));
        assert_eq!((slots.remove(1), slots.remove(9)), (None, None));
        assert_eq!((slots.len(), slots.get(1), slots.get(4)), (3, None, Some(&4)));
        for _ in 0..3 {
            let (next, object) = (slots.vacant(100), slots.len() + 10);
            assert_eq!(next, Some(slots.insert(object)));
        }
        assert_eq!(slots.len(), 6);
        assert_eq!(slots.take_all().count(), 6);
        assert!(slots.is_empty() && slots.vacant(1) == Some(0));
    }

    #[test]
    fn the_limit_holds_with_and_without_gaps() {
        let mut slots = Slots::default();
        assert_eq!(slots.vacant(0), None);
        (0..3).for_each(|n| assert_eq!(slots.insert(n), n));
        assert_eq!(slots.vacant(3), None);
        slots.remove(2);
        assert_eq!(slots.vacant(3), Some(2));
    }
}
