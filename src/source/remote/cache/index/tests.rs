//! What is appended is read again, whatever was lost between.

use super::*;

fn index() -> Index {
    let head = Head {
        address: "https://host/m.gguf".into(),
        pin: Pin::default(),
        set: None,
    };
    Index::create(tempfile::tempfile().unwrap(), head).unwrap()
}

fn again(index: &Index) -> Index {
    Index::open(index.file.try_clone().unwrap())
        .unwrap()
        .unwrap()
}

#[test]
fn the_note_of_the_whole_model_costs_no_piece() {
    let mut index = index();
    index.append(&[written(0, 1, 10)]).unwrap();
    index.note_set(u64::MAX).unwrap();
    let again = again(&index);
    assert_eq!((again.head.set, again.pieces.len()), (Some(u64::MAX), 1));
}

fn written(start: u64, byte: u8, len: usize) -> Record {
    Record::Written(start, Piece::of(start, &vec![byte; len], 7, 1000))
}

#[test]
fn what_was_appended_is_read_again() {
    let mut index = index();
    let records = [
        written(0, 1, 100),
        written(100, 2, PIECE_BYTES as usize - 100),
        written(5000, 3, 10),
        Record::Gone { start: 5000 },
        Record::Used { start: 0, at: 2000 },
    ];
    index.append(&records).unwrap();
    let again = again(&index);
    assert_eq!(again.pieces, index.pieces);
    assert_eq!(again.pieces.len(), 2);
    assert_eq!(again.pieces[&0].used, 2000);
    assert_eq!(again.holding(99).unwrap().0, 0);
    assert_eq!(again.holding(100).unwrap().0, 100);
    assert!(again.holding(PIECE_BYTES).is_none());
    assert_eq!(again.next_after(0), Some(100));
}

#[test]
fn a_torn_or_damaged_record_takes_only_its_own_piece_with_it() {
    let mut index = index();
    index
        .append(&[written(0, 1, 100), written(100, 2, 100)])
        .unwrap();
    // The disk was full after 50 bytes.
    let end = index.file.metadata().unwrap().len();
    index.file.write_all_at(&[9; 50], end).unwrap();
    index.append(&[written(200, 3, 100)]).unwrap();
    index
        .file
        .write_all_at(&[0xff], HEAD_BYTES as u64 + 20)
        .unwrap();
    let again = again(&index);
    assert_eq!(again.pieces.keys().collect::<Vec<_>>(), [&100, &200]);
}

#[test]
fn pieces_that_overlap_hide_nothing_of_each_other() {
    let mut index = index();
    let records = [written(0, 1, 1000), written(0, 1, 10), written(500, 1, 100)];
    index.append(&records).unwrap();
    for place in [0, 10, 499, 500, 599, 600, 999] {
        assert!(index.holding(place).is_some(), "{place}");
    }
    assert!(index.holding(1000).is_none());
}

#[test]
fn two_that_append_see_each_other() {
    let mut one = index();
    let mut other = again(&one);
    one.append(&[written(0, 1, 100)]).unwrap();
    other.append(&[written(100, 2, 100)]).unwrap();
    one.refresh().unwrap();
    assert_eq!(one.pieces, other.pieces);
    assert_eq!(one.pieces.len(), 2);
}

#[test]
fn bytes_match_block_by_block() {
    let bytes: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
    // Blocks begin at the same places of the file, wherever the piece does.
    for start in [0, 1, 65535, 65536, 70_000, 3 * BLOCK_BYTES + 4096] {
        let end = start + bytes.len() as u64;
        let slice =
            |range: &Range<u64>| (range.start - start) as usize..(range.end - start) as usize;
        let piece = Piece::of(start, &bytes, 0, 0);
        assert_eq!(piece.blocks(start, &(start..end)), start..end);
        assert!(piece.matches(start, start, &bytes));
        for place in [start, start + 70_000, end - 1] {
            let blocks = piece.blocks(start, &(place..place + 1));
            assert!(blocks.contains(&place) && blocks.end - blocks.start <= BLOCK_BYTES);
            assert!(blocks.start == start || blocks.start.is_multiple_of(BLOCK_BYTES));
            assert!(blocks.end == end || blocks.end.is_multiple_of(BLOCK_BYTES));
            let mut damaged = bytes.clone();
            damaged[(place - start) as usize] ^= 1;
            let whole = slice(&blocks);
            assert!(!piece.matches(start, blocks.start, &damaged[whole.clone()]));
            assert!(piece.matches(start, start, &damaged[..whole.start]));
            assert!(piece.matches(start, blocks.end, &damaged[whole.end..]));
        }
    }
}

#[test]
fn the_longest_piece_has_a_checksum_for_each_of_its_blocks() {
    for start in [
        0,
        1,
        4096,
        BLOCK_BYTES - 1,
        BLOCK_BYTES,
        10 * PIECE_BYTES + 7,
    ] {
        let bytes = vec![1; (piece_end(start) - start) as usize];
        let last = bytes.len() - 1;
        let piece = Piece::of(start, &bytes, 0, 0);
        assert!(piece.matches(start, start, &bytes));
        let mut damaged = bytes;
        damaged[last] = 0;
        assert!(!piece.matches(start, start, &damaged), "{start}");
        let record = Record::Written(start, piece);
        assert_eq!(Record::from_bytes(&record.to_bytes()), Some(record));
    }
}

#[test]
fn something_else_is_not_an_index() {
    for bytes in [&b""[..], b"odmoe-fs cache 1\n", &[b'x'; 10_000]] {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        assert!(Index::open(file).unwrap().is_none());
    }
}
