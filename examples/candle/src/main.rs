//! An expert with candle, of an F32, F16 or BF16 model: `cargo run --release -- MOUNT LAYER EXPERT`.

use candle_core::{DType, Device, Error, Result, Tensor, safetensors};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [mount, layer, expert] = &arguments[..] else {
        return Err(Error::Msg("usage: candle-expert MOUNT LAYER EXPERT".into()));
    };
    let path = format!("{mount}/experts/layer_{layer:0>2}_expert_{expert:0>3}.safetensors");
    let device = Device::Cpu;
    let weights = safetensors::load(path, &device)?;
    let matrix = |name: &str| -> Result<Tensor> {
        let tensor = &weights[name];
        if tensor.dtype() == DType::U8 {
            return Err(Error::Msg(format!("{name} is GGML blocks; this example is for F32, F16 and BF16")));
        }
        println!("{name} {:?} {:?}", tensor.dims(), tensor.dtype());
        tensor.to_dtype(DType::F32)
    };
    let (w1, w2, w3) = (matrix("w1.weight")?, matrix("w2.weight")?, matrix("w3.weight")?);
    // A vector of ones.
    let x = Tensor::ones((w1.dim(1)?, 1), DType::F32, &device)?;
    let hidden = (w1.matmul(&x)?.silu()? * w3.matmul(&x)?)?;
    let y = w2.matmul(&hidden)?;
    println!("norm {:.4}", y.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?);
    Ok(())
}
