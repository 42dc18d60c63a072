//! An expert with candle: `cargo run --release -- MOUNT LAYER EXPERT`.
//!
//! On an ordinary mount, nothing is converted: candle multiplies by GGML blocks as they lie (Q4_0 to
//! Q8_0, Q2_K to Q6_K), and by F32, F16 and BF16. For other types, mount with `--as f16`.

use std::error::Error;

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::safetensors::Load;
use candle_core::{DType, Device, Module, Result, Tensor};
use safetensors::SafeTensors;
use serde_json::Value;

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [mount, layer, expert] = &arguments[..] else {
        return Err("usage: candle-expert MOUNT LAYER EXPERT".into());
    };
    let path = format!("{mount}/experts/layer_{layer:0>2}_expert_{expert:0>3}.safetensors");
    let bytes = std::fs::read(path)?;
    let file = SafeTensors::deserialize(&bytes)?;
    let (_, header) = SafeTensors::read_metadata(&bytes)?;
    let metadata = header.metadata().as_ref().ok_or("the file has no metadata")?;
    let tensors: Value = serde_json::from_str(&metadata["odmoe.tensors"])?;

    let linear = |name: &str| -> std::result::Result<Linear, Box<dyn Error>> {
        let beside = |part| file.tensor(&name.replace("weight", part)).ok();
        let beside = |part| beside(part).map(|tensor| tensor.load(&Device::Cpu)).transpose();
        // What the tensor is in the model; in a form with numbers, these are in `form.dtype`.
        let tensor = &tensors[name];
        let stored = tensor["form"]["dtype"].as_str().or(tensor["ggml_type"].as_str());
        let stored = stored.ok_or("the type is missing")?;
        let dtype = dtype(stored).ok_or_else(|| format!("candle does not know {stored}"))?;
        let shape: Vec<usize> = serde_json::from_value(tensor["shape"].clone())?;
        let blocks = file.tensor(name)?.data();
        println!("{name} {shape:?} {dtype:?}, {} bytes", blocks.len());
        let storage = QStorage::from_data(blocks.into(), &Device::Cpu, dtype)?;
        let matrix = QMatMul::from_qtensor(QTensor::new(storage, shape)?)?;
        Ok(Linear { matrix, scale: beside("scale")?, bias: beside("bias")? })
    };
    let (w1, w2, w3) = (linear("w1.weight")?, linear("w2.weight")?, linear("w3.weight")?);
    let dim = tensors["w1.weight"]["shape"][1].as_u64().ok_or("the shape is missing")?;
    let y = feed_forward(&w1, &w2, &w3, dim as f32)?;
    println!("norm {:.6}", y.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?);
    Ok(())
}

/// A matrix. Some models have a number beside it, by which the product is multiplied, or a bias.
struct Linear {
    matrix: QMatMul,
    scale: Option<Tensor>,
    bias: Option<Tensor>,
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut y = self.matrix.forward(x)?;
        if let Some(scale) = &self.scale {
            y = y.broadcast_mul(scale)?;
        }
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

/// The type of candle that a name of GGML means.
fn dtype(name: &str) -> Option<GgmlDType> {
    Some(match name {
        "F32" => GgmlDType::F32,
        "F16" => GgmlDType::F16,
        "BF16" => GgmlDType::BF16,
        "Q4_0" => GgmlDType::Q4_0,
        "Q4_1" => GgmlDType::Q4_1,
        "Q5_0" => GgmlDType::Q5_0,
        "Q5_1" => GgmlDType::Q5_1,
        "Q8_0" => GgmlDType::Q8_0,
        "Q2_K" => GgmlDType::Q2K,
        "Q3_K" => GgmlDType::Q3K,
        "Q4_K" => GgmlDType::Q4K,
        "Q5_K" => GgmlDType::Q5K,
        "Q6_K" => GgmlDType::Q6K,
        _ => return None,
    })
}

/// `w2 · (silu(w1 · x) * (w3 · x))`, of the vector that all examples have.
fn feed_forward(w1: &Linear, w2: &Linear, w3: &Linear, dim: f32) -> Result<Tensor> {
    let x = Tensor::arange(0.0, dim, &Device::Cpu)?.to_dtype(DType::F32)?.sin()?.unsqueeze(0)?;
    let hidden = (w1.forward(&x)?.silu()? * w3.forward(&x)?)?;
    w2.forward(&hidden)
}
