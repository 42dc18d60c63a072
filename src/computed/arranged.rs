//! Arrays whose elements lie in another order than in the model: every other row of a matrix, or a
//! matrix transposed.

use crate::codec::Codec;

/// Bytes of the model that are read at a time.
const STEP_BYTES: u64 = 256 << 10;
/// The side of the squares in which a matrix is transposed, in elements: both fit into a cache.
const SQUARE: usize = 32;

/// Rows that lie apart from each other, as an array of rows side by side.
#[derive(Debug, Clone, Copy)]
pub struct Apart {
    /// Bytes of a row in the model, and from the start of one to that of the next.
    pub row: u64,
    pub step: u64,
    pub count: u64,
    /// What makes the array of a row; `None` if it is the row.
    pub codec: Option<Codec>,
}

impl Apart {
    /// Bytes that a row becomes.
    fn row_out(&self) -> u64 {
        match self.codec {
            None => self.row,
            Some(codec) => self.row / codec.unit().blocks as u64 * codec.unit().out as u64,
        }
    }

    /// Bytes of the array.
    pub fn bytes(&self) -> u64 {
        self.count * self.row_out()
    }

    /// Fills `out` with the bytes of the array from `offset` on. `read` reads the bytes of the
    /// model from an offset on, counted from the first row.
    pub fn range<E>(
        &self,
        offset: u64,
        out: &mut [u8],
        read: impl Fn(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let row_out = self.row_out();
        let (mut blocks, mut made) = (Vec::new(), vec![0; row_out as usize]);
        let mut rest = out;
        let mut row = offset / row_out;
        let mut skip = (offset % row_out) as usize;
        while !rest.is_empty() {
            let wanted = (skip as u64 + rest.len() as u64).div_ceil(row_out);
            let rows = wanted.min(STEP_BYTES.div_ceil(self.step));
            blocks.resize(((rows - 1) * self.step + self.row) as usize, 0);
            read(row * self.step, &mut blocks)?;
            for n in 0..rows {
                let start = (n * self.step) as usize;
                let stored = &blocks[start..start + self.row as usize];
                let made = match self.codec {
                    None => stored,
                    Some(codec) => {
                        codec.compute(stored, &mut made);
                        &made[..]
                    }
                };
                let len = rest.len().min(made.len() - skip);
                let (here, after) = rest.split_at_mut(len);
                here.copy_from_slice(&made[skip..skip + len]);
                (rest, skip) = (after, 0);
            }
            row += rows;
        }
        Ok(())
    }
}

/// One or two matrices of the same shape. Of two, the rows come in turn. Then the whole is
/// transposed.
#[derive(Debug, Clone, Copy)]
pub struct Transposed {
    /// Of each of the matrices, in the model.
    pub rows: u64,
    pub columns: u64,
    pub matrices: u64,
    /// Bytes of each matrix in the model.
    pub bytes: [u64; 2],
    /// Bytes of an element of the array: 2 or 4.
    pub width: u64,
    /// What makes the elements of each; `None` if they are the model's own.
    pub codecs: [Option<Codec>; 2],
}

impl Transposed {
    /// Bytes of the array.
    pub fn size(&self) -> u64 {
        self.matrices * self.rows * self.columns * self.width
    }

    /// The whole array. `read` reads a matrix.
    pub fn whole<E>(&self, read: impl Fn(u64, &mut [u8]) -> Result<(), E>) -> Result<Box<[u8]>, E> {
        let mut out = vec![0; self.size() as usize];
        let mut blocks = Vec::new();
        let elements = (self.rows * self.columns * self.width) as usize;
        let mut numbers = vec![0; elements];
        for n in 0..self.matrices {
            let bytes = self.bytes[n as usize];
            match self.codecs[n as usize] {
                None => read(n, &mut numbers)?,
                Some(codec) => {
                    blocks.resize(bytes as usize, 0);
                    read(n, &mut blocks)?;
                    codec.compute(&blocks, &mut numbers);
                }
            }
            match self.width {
                2 => self.put::<2>(n, &numbers, &mut out),
                4 => self.put::<4>(n, &numbers, &mut out),
                _ => unreachable!("numbers are of two or four bytes"),
            }
        }
        Ok(out.into())
    }

    fn put<const W: usize>(&self, n: u64, numbers: &[u8], out: &mut [u8]) {
        let (numbers, _) = numbers.as_chunks::<W>();
        let (out, _) = out.as_chunks_mut::<W>();
        let [rows, columns, matrices, n] =
            [self.rows, self.columns, self.matrices, n].map(|n| n as usize);
        for top in (0..rows).step_by(SQUARE) {
            for left in (0..columns).step_by(SQUARE) {
                for row in top..rows.min(top + SQUARE) {
                    for column in left..columns.min(left + SQUARE) {
                        let to = (column * rows + row) * matrices + n;
                        out[to] = numbers[row * columns + column];
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{Float, Output};
    use crate::gguf::GgmlType;

    fn reader(bytes: &[u8]) -> impl Fn(u64, &mut [u8]) -> Result<(), ()> + '_ {
        |offset, out| {
            let start = offset as usize;
            out.copy_from_slice(&bytes[start..start + out.len()]);
            Ok(())
        }
    }

    #[test]
    fn every_range_of_rows_that_lie_apart_is_that_of_the_whole() {
        let q8_0 = GgmlType::from_name("Q8_0").unwrap();
        let codec = Codec::of(q8_0, Output::Numbers(Float::F16)).unwrap();
        let blocks: Vec<u8> = (0..40 * 68).map(|n| (n * 7 % 61) as u8).collect();
        for codec in [None, Some(codec)] {
            let apart = Apart {
                row: 68,
                step: 3 * 68,
                count: 13,
                codec,
            };
            let mut whole = vec![0; apart.bytes() as usize];
            apart.range(0, &mut whole, reader(&blocks)).unwrap();
            let row = whole.len() / 13;
            for n in 0..13 {
                let stored = &blocks[3 * n * 68..][..68];
                let mut expected = vec![0; row];
                match codec {
                    None => expected.copy_from_slice(stored),
                    Some(codec) => codec.compute(stored, &mut expected),
                }
                assert_eq!(whole[n * row..][..row], expected);
            }
            for (offset, len) in [(0, 1), (1, 200), (row - 1, 2), (row, row), (17, 5 * row)] {
                let mut part = vec![0; len];
                apart
                    .range(offset as u64, &mut part, reader(&blocks))
                    .unwrap();
                assert_eq!(part, whole[offset..offset + len]);
            }
        }
    }

    #[test]
    fn rows_of_two_matrices_in_turn_become_columns_in_turn() {
        let (rows, columns) = (37, 50);
        let matrix = |n: u16| -> Vec<u8> {
            let elements = (0..rows * columns).map(|at| at as u16 * 2 + n);
            elements.flat_map(u16::to_le_bytes).collect()
        };
        let stored = [matrix(0), matrix(1)];
        for matrices in [1, 2] {
            let transposed = Transposed {
                rows,
                columns,
                matrices,
                bytes: [stored[0].len() as u64; 2],
                width: 2,
                codecs: [None; 2],
            };
            let read = |n: u64, out: &mut [u8]| -> Result<(), ()> {
                out.copy_from_slice(&stored[n as usize]);
                Ok(())
            };
            let out = transposed.whole(read).unwrap();
            let (out, _) = out.as_chunks::<2>();
            let mut at = 0;
            for column in 0..columns {
                for row in 0..rows {
                    for n in 0..matrices {
                        let expected = ((row * columns + column) * 2 + n) as u16;
                        assert_eq!(u16::from_le_bytes(out[at]), expected);
                        at += 1;
                    }
                }
            }
        }
    }
}
