//! Bus addresses.

use std::ops::Range;

use extlb_spec::addr::GPA_BITS;
use extlb_spec::{Gpa, PAGE_SIZE};

/// Where writes are interrupts on x86, not memory (Intel SDM, volume 3, 11.11: "Message Signalled
/// Interrupts"). A device that were given memory there would raise interrupts at random.
const MSI: Range<u64> = 0xfee0_0000..0xfef0_0000;

/// What of `ranges` can be used for memory: whole pages that the device can name, without the
/// interrupts' window, and without page 0, so that an address that nobody set is never good.
pub(super) fn usable(ranges: impl IntoIterator<Item = Range<u64>>) -> Vec<Range<Gpa>> {
    let kept = [PAGE_SIZE..MSI.start, MSI.end..1 << GPA_BITS];
    let mut usable: Vec<_> = ranges
        .into_iter()
        .flat_map(|range| {
            kept.clone().map(|kept| {
                let start = range.start.clamp(kept.start, kept.end);
                let start = start.next_multiple_of(PAGE_SIZE);
                let end = range.end.min(kept.end) & !(PAGE_SIZE - 1);
                Gpa(start)..Gpa(end)
            })
        })
        .filter(|range| range.start < range.end)
        .collect();
    usable.sort_by_key(|range| range.start);
    usable
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupts_page_zero_and_odd_ends_are_left_out() {
        let all = usable(std::iter::once(0..u64::MAX));
        assert_eq!(
            all,
            [
                Gpa(0x1000)..Gpa(0xfee0_0000),
                Gpa(0xfef0_0000)..Gpa(1 << GPA_BITS)
            ]
        );
        let odd = usable(std::iter::once(0x1800..0x3fff));
        assert_eq!(odd, vec![Gpa(0x2000)..Gpa(0x3000)]);
        assert_eq!(usable([0xfee0_0000..0xfeef_ffff, 5..7]), []);
        assert_eq!(
            usable([0x9000..0xa000, 0x4000..0x5000]),
            [Gpa(0x4000)..Gpa(0x5000), Gpa(0x9000)..Gpa(0xa000)]
        );
    }
}
