//! Chance made to order: `resolve` takes it as an argument, so a certain outcome can be asked for.

use rand::RngCore;

/// Draws these numbers, in this order, and then middles.
#[derive(Default, Clone)]
pub(super) struct Script(Vec<u64>, usize);

/// What follows where a draw was not foreseen.
const MIDDLE: u64 = 1 << 63;

impl Script {
    /// Then a draw that leads to the item whose share of `total` begins at `before` and is `weight`.
    ///
    /// [`rand::Rng::random_range`] scales a 64-bit number down to the range; the middle of an item's share is far from the
    /// next item for every range that weights of 32 bits can make.
    pub(super) fn then(mut self, before: u64, weight: u32, total: u64) -> Self {
        let middle = u128::from(before) * 2 + u128::from(weight);
        let drawn = (middle << 63) / u128::from(total.max(1));
        self.0.push(u64::try_from(drawn).unwrap_or(u64::MAX));
        self
    }
}

impl RngCore for Script {
    fn next_u32(&mut self) -> u32 {
        (self.next_u64() >> 32) as u32
    }

    fn next_u64(&mut self) -> u64 {
        let drawn = self.0.get(self.1).copied().unwrap_or(MIDDLE);
        self.1 += 1;
        drawn
    }

    fn fill_bytes(&mut self, bytes: &mut [u8]) {
        bytes.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&self.next_u64().to_le_bytes()[..chunk.len()]));
    }
}

#[cfg(test)]
mod tests {
    use rand::Rng;

    use super::*;

    #[test]
    fn every_item_can_be_drawn() {
        for weights in [vec![1], vec![1, 1, 1], vec![3, 1, 9], vec![u32::MAX, 1, u32::MAX], vec![1; 1000]] {
            let total = weights.iter().map(|w| u64::from(*w)).sum();
            let mut before = 0;
            for weight in weights {
                let drawn = Script::default().then(before, weight, total).random_range(0..total);
                assert!((before..before + u64::from(weight)).contains(&drawn), "{before}+{weight} of {total}: {drawn}");
                before += u64::from(weight);
            }
        }
    }
}
