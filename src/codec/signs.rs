//! Sign bits.

/// The bits of each byte as eight numbers, bit 0 first: -1 where it is set, else 0.
pub(super) static NEGATIVE: [[i8; 8]; 256] = {
    let mut table = [[0; 8]; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut bit = 0;
        while bit < 8 {
            table[byte][bit] = -((byte >> bit & 1) as i8);
            bit += 1;
        }
        byte += 1;
    }
    table
};
