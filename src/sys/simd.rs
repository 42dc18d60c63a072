//! Choosing vector instructions at run time.

/// Work on blocks of bytes that is worth compiling for several instruction sets. `run` must be
/// `#[inline(always)]`, and so must be what it calls in its loops: it is compiled into its caller,
/// for the instructions that the caller may use.
pub trait Kernel {
    /// Bytes of a block.
    const BLOCK: usize;
    /// Bytes that a block becomes.
    const OUT: usize;

    /// Works on as many whole blocks as both slices have room for.
    fn run(blocks: &[u8], out: &mut [u8]);
}

/// Proof that this processor has AVX2.
#[derive(Clone, Copy)]
pub struct Avx2(());

impl Avx2 {
    /// `None` if this processor has no AVX2.
    pub fn detect() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        let detected = std::arch::is_x86_feature_detected!("avx2");
        #[cfg(not(target_arch = "x86_64"))]
        let detected = false;
        detected.then_some(Self(()))
    }

    /// Runs the kernel, compiled for AVX2.
    pub fn run<K: Kernel>(self, blocks: &[u8], out: &mut [u8]) {
        #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2"))]
        fn with_avx2<K: Kernel>(blocks: &[u8], out: &mut [u8]) {
            K::run(blocks, out);
        }
        // SAFETY: this processor has AVX2, as `self` proves.
        #[cfg_attr(not(target_arch = "x86_64"), allow(unused_unsafe))]
        unsafe {
            with_avx2::<K>(blocks, out);
        }
    }
}
