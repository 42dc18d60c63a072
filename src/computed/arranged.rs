//! Arrays whose elements lie in another order than in the model: every other row of a matrix, or a
//! matrix transposed.

use std::ops::Range;

use crate::codec::{Codec, Unit};

/// Bytes of the model that are read at a time.
const STEP_BYTES: u64 = 256 << 10;
/// Rows of a matrix that are transposed at a time: what is read of them and what is written fit into
/// a cache.
const TILE_ROWS: usize = 32;

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

    /// Bytes of the model, counted from the first row, that hold what a range of the array is made
    /// of.
    pub fn stored(&self, range: &Range<u64>) -> Range<u64> {
        let first = range.start / self.row_out();
        let last = range.end.div_ceil(self.row_out()) - 1;
        first * self.step..last * self.step + self.row
    }

    /// Fills `out` with the bytes of the array from `offset` on. `read` reads the bytes of the
    /// model from an offset on, counted from the first row.
    pub fn range<E>(
        &self,
        offset: u64,
        out: &mut [u8],
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
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
    /// Bytes of a row of each matrix in the model.
    pub row: [u64; 2],
    /// Bytes of an element of the array: 2 or 4.
    pub width: u64,
    /// What makes the elements of each; `None` if they are the model's own.
    pub codecs: [Option<Codec>; 2],
}

impl Transposed {
    /// Bytes of the array.
    pub fn size(&self) -> u64 {
        self.columns * self.column()
    }

    /// Bytes of a matrix in the model: any range of the array is made of some of each of its rows.
    pub fn stored(&self, n: usize) -> u64 {
        self.rows * self.row[n]
    }

    /// Bytes of a column of the matrices, which the array has side by side.
    fn column(&self) -> u64 {
        self.rows * self.matrices * self.width
    }

    /// Fills `out` with the bytes of the array from `offset` on. `read` reads the bytes of a matrix
    /// from an offset on: of each row, what the columns of the range are made of.
    pub fn range<E>(
        &self,
        offset: u64,
        out: &mut [u8],
        read: impl FnMut(u64, u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        match self.width {
            2 => self.columns_of::<2, E>(offset, out, read),
            4 => self.columns_of::<4, E>(offset, out, read),
            _ => unreachable!("numbers are of two or four bytes"),
        }
    }

    fn columns_of<const W: usize, E>(
        &self,
        offset: u64,
        out: &mut [u8],
        mut read: impl FnMut(u64, u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let end = offset + out.len() as u64;
        let columns = offset / self.column()..end.div_ceil(self.column());
        let matrices = self.matrices as usize;
        let mut tiles = [Tile::default(), Tile::default()];
        let mut run = [[0; W]; 2 * TILE_ROWS];
        for top in (0..self.rows).step_by(TILE_ROWS) {
            let rows = (self.rows - top).min(TILE_ROWS as u64);
            for (n, tile) in tiles[..matrices].iter_mut().enumerate() {
                let units = Units::of(self.codecs[n], W, &columns);
                tile.fill(units, rows, |row, blocks| {
                    let start = (top + row) * self.row[n] + units.first_block();
                    read(n as u64, start, blocks)
                })?;
            }
            let run = &mut run[..rows as usize * matrices];
            for column in columns.clone() {
                for (n, tile) in tiles[..matrices].iter().enumerate() {
                    tile.column(column, &mut run[n..], matrices);
                }
                // What is wanted of it; the first and the last column may be wanted in part.
                let start = column * self.column() + top * self.matrices * self.width;
                let run = run.as_flattened();
                let wanted = start.max(offset)..(start + run.len() as u64).min(end);
                if !wanted.is_empty() {
                    let here = (wanted.start - offset) as usize..(wanted.end - offset) as usize;
                    let from = (wanted.start - start) as usize;
                    out[here.clone()].copy_from_slice(&run[from..from + here.len()]);
                }
            }
        }
        Ok(())
    }
}

/// The units of a row from which a range of its columns is made.
#[derive(Debug, Clone, Copy)]
struct Units {
    codec: Option<Codec>,
    unit: Unit,
    first: u64,
    count: u64,
}

impl Units {
    fn of(codec: Option<Codec>, width: usize, columns: &Range<u64>) -> Self {
        let own = Unit {
            blocks: width,
            out: width,
        };
        let unit = codec.map_or(own, |codec| codec.unit());
        let (width, out) = (width as u64, unit.out as u64);
        let first = columns.start * width / out;
        Self {
            codec,
            unit,
            first,
            count: (columns.end * width).div_ceil(out) - first,
        }
    }

    /// Where the blocks begin in the row.
    fn first_block(&self) -> u64 {
        self.first * self.unit.blocks as u64
    }
}

/// Numbers of a few rows of a matrix.
#[derive(Debug, Default)]
struct Tile {
    blocks: Vec<u8>,
    numbers: Vec<u8>,
    /// Bytes of numbers of a row.
    row: usize,
    /// Bytes of numbers of the row in front of those.
    before: u64,
}

impl Tile {
    fn fill<E>(
        &mut self,
        units: Units,
        rows: u64,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.row = units.count as usize * units.unit.out;
        self.before = units.first * units.unit.out as u64;
        self.blocks
            .resize(units.count as usize * units.unit.blocks, 0);
        self.numbers.resize(rows as usize * self.row, 0);
        for (n, numbers) in self.numbers.chunks_exact_mut(self.row).enumerate() {
            match units.codec {
                None => read(n as u64, numbers)?,
                Some(codec) => {
                    read(n as u64, &mut self.blocks)?;
                    codec.compute(&self.blocks, numbers);
                }
            }
        }
        Ok(())
    }

    /// Puts a column's numbers into every `step`th place.
    fn column<const W: usize>(&self, column: u64, out: &mut [[u8; W]], step: usize) {
        let at = (column * W as u64 - self.before) as usize / W;
        let (numbers, _) = self.numbers.as_chunks::<W>();
        let numbers = numbers[at..].iter().step_by(self.row / W);
        for (out, number) in out.iter_mut().step_by(step).zip(numbers) {
            *out = *number;
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
                row: [columns * 2; 2],
                width: 2,
                codecs: [None; 2],
            };
            let read = |n: u64, offset: u64, out: &mut [u8]| -> Result<(), ()> {
                out.copy_from_slice(&stored[n as usize][offset as usize..][..out.len()]);
                Ok(())
            };
            let mut whole = vec![0; transposed.size() as usize];
            transposed.range(0, &mut whole, read).unwrap();
            let column = transposed.column() as usize;
            for (offset, len) in [(0, 1), (1, 2), (column - 1, 2), (column, column), (77, 999)] {
                let mut part = vec![0; len];
                transposed.range(offset as u64, &mut part, read).unwrap();
                assert_eq!(part, whole[offset..offset + len]);
            }
            let (out, _) = whole.as_chunks::<2>();
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
