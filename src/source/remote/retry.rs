//! How long to wait before asking a server again, and when to give up.

use std::time::{Duration, Instant};

/// The first wait; each next one is twice as long.
const FIRST: Duration = Duration::from_millis(100);
/// The longest wait, unless the server asks for more.
const LONGEST: Duration = Duration::from_secs(5);
/// How long a read may wait for bytes, all its attempts together.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The waits of one read.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
    /// When it began to wait, all the times when bytes came left out.
    since: Instant,
}

impl Backoff {
    /// A read that begins now.
    pub fn new(now: Instant) -> Self {
        Self {
            next: FIRST,
            since: now,
        }
    }

    /// An attempt has brought bytes until it failed.
    pub fn progressed(&mut self, now: Instant) {
        *self = Self::new(now);
    }

    /// How long to wait after a fault, and at least as long as the server asks for; `None` if that
    /// would be too long. Several reads that fail together do not come back together: `chance` is a
    /// number from 0 to 255.
    pub fn wait(&mut self, after: Option<Duration>, chance: u8, now: Instant) -> Option<Duration> {
        let spread = self.next / 4 * u32::from(chance) / 255;
        let wait = (self.next + spread).max(after.unwrap_or_default());
        self.next = (self.next * 2).min(LONGEST);
        // No sum of times: a server may ask for any number of seconds.
        (wait < PATIENCE.saturating_sub(self.waited(now))).then_some(wait)
    }

    /// Bytes have come for so long, and then none.
    pub fn received_for(&mut self, time: Duration) {
        self.since += time;
    }

    /// How long it has waited.
    pub fn waited(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_until_the_patience_is_over() {
        let start = Instant::now();
        let mut backoff = Backoff::new(start);
        let (mut now, mut waits) = (start, Vec::new());
        while let Some(wait) = backoff.wait(None, 0, now) {
            now += wait;
            waits.push(wait.as_millis());
        }
        assert_eq!(waits[..7], [100, 200, 400, 800, 1600, 3200, 5000]);
        let last = now - start;
        assert!(last < PATIENCE && last + LONGEST >= PATIENCE);
        backoff.progressed(now);
        assert_eq!(backoff.wait(None, 0, now), Some(FIRST));
        // Of a minute, bytes came for 50 seconds.
        now += 2 * PATIENCE;
        backoff.received_for(Duration::from_secs(50));
        assert_eq!(backoff.waited(now), Duration::from_secs(10));
        assert_eq!(backoff.wait(None, 0, now), Some(2 * FIRST));
    }

    #[test]
    fn the_server_may_ask_for_a_longer_wait_but_not_beyond_the_patience() {
        let now = Instant::now();
        let mut backoff = Backoff::new(now);
        let three = Duration::from_secs(3);
        assert_eq!(backoff.wait(Some(three), 255, now), Some(three));
        assert_eq!(backoff.wait(Some(Duration::ZERO), 0, now), Some(2 * FIRST));
        for beyond in [
            PATIENCE,
            Duration::from_secs(i64::MAX as u64),
            Duration::MAX,
        ] {
            assert_eq!(backoff.wait(Some(beyond), 0, now), None);
        }
    }

    #[test]
    fn reads_that_fail_together_come_back_at_different_times() {
        let now = Instant::now();
        let wait = |chance| Backoff::new(now).wait(None, chance, now).unwrap();
        assert!(wait(0) < wait(100) && wait(100) < wait(255));
        assert!(wait(255) <= FIRST * 5 / 4);
    }
}
