//! The latency histogram that the kernel driver keeps: log-linear, 8 buckets an octave.
//!
//! Values below 8 have a bucket each; above, a bucket is an eighth of an octave, so a bucket's
//! floor is at most 12.5 % below the value.

/// Number of buckets: up to 2^42 ns, more than an hour; larger values go into the last.
pub const BUCKETS: usize = 320;

/// The bucket of a value.
pub const fn bucket(value: u64) -> usize {
    if value < 8 {
        return value as usize;
    }
    let octave = value.ilog2(); // >= 3
    let index = ((octave - 2) as usize) * 8 + (value >> (octave - 3) & 7) as usize;
    if index < BUCKETS { index } else { BUCKETS - 1 }
}

/// The smallest value of a bucket.
pub const fn floor(bucket: usize) -> u64 {
    if bucket < 8 {
        return bucket as u64;
    }
    let octave = bucket / 8 + 2;
    (8 + (bucket % 8) as u64) << (octave - 3)
}

/// The value at `per_mille` of all values (floor of its bucket); 0 if there are none.
pub fn percentile(counts: &[u64], per_mille: u64) -> u64 {
    let total: u64 = counts.iter().sum();
    let wanted = (total * per_mille).div_ceil(1000).max(1);
    let mut seen = 0;
    for (i, count) in counts.iter().enumerate() {
        seen += count;
        if seen >= wanted {
            return floor(i);
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bucket_starts_at_its_floor_and_they_are_dense() {
        for b in 0..BUCKETS {
            assert_eq!(bucket(floor(b)), b);
            if b > 0 {
                assert_eq!(bucket(floor(b) - 1), b - 1);
            }
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_of_a_known_set() {
        let mut counts = [0u64; BUCKETS];
        for v in 1..=1000u64 {
            counts[bucket(v)] += 1;
        }
        let p50 = percentile(&counts, 500);
        assert!((438..=500).contains(&p50), "{p50}");
        let p99 = percentile(&counts, 990);
        assert!((866..=990).contains(&p99), "{p99}");
        assert_eq!(percentile(&[0; BUCKETS], 500), 0);
    }
}
