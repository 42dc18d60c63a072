//! `--as`: the form of quantised tensors, for every command that opens a model to show it.

use odmoe_fs::codec::Float;
use odmoe_fs::form::Form;

use super::failure::{Failure, Result};

#[derive(Clone, Copy, Debug, clap::Args)]
pub struct FormArgs {
    /// The form of quantised tensors
    #[arg(
        long = "as",
        value_enum,
        value_name = "FORM",
        default_value_t,
        help_heading = "Form"
    )]
    form: FormName,
    /// With --as mlx, the dtype of scales and biases, and of tensors that MLX cannot pack [default: f16]
    #[arg(long, value_enum, value_name = "DTYPE", help_heading = "Form")]
    scales: Option<FloatName>,
    /// With --as mlx, quantise Q6_K, Q2_K, IQ2_XS and IQ2_S anew, to 8 bits in groups of 32
    ///
    /// MLX cannot pack these types as they are. The new numbers differ a little from those of the
    /// model. Without this option, such tensors are numbers of the dtype of --scales.
    #[arg(long, help_heading = "Form")]
    requant: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum FormName {
    /// The blocks of the model, as U8
    #[default]
    Raw,
    /// Numbers of 32 bits, exactly those of the model
    F32,
    /// Numbers of 16 bits
    F16,
    /// Numbers of 16 bits with the range of F32
    Bf16,
    /// Packed codes, scales and biases, on which MLX computes as they are
    Mlx,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum FloatName {
    F16,
    Bf16,
    F32,
}

impl From<FloatName> for Float {
    fn from(name: FloatName) -> Self {
        match name {
            FloatName::F16 => Self::F16,
            FloatName::Bf16 => Self::Bf16,
            FloatName::F32 => Self::F32,
        }
    }
}

impl FormArgs {
    /// The form that the options ask for together.
    pub fn form(self) -> Result<Form> {
        let form = match self.form {
            FormName::Raw => Form::Raw,
            FormName::F32 => Form::Numbers(Float::F32),
            FormName::F16 => Form::Numbers(Float::F16),
            FormName::Bf16 => Form::Numbers(Float::Bf16),
            FormName::Mlx => {
                return Ok(Form::Mlx {
                    scales: self.scales.map_or(Float::F16, Float::from),
                    requant: self.requant,
                });
            }
        };
        let other = if self.scales.is_some() {
            "--scales"
        } else if self.requant {
            "--requant"
        } else {
            return Ok(form);
        };
        let message = format!("{other} means nothing with --as {form}");
        Err(Failure::usage(message).hint("add --as mlx, or leave it out"))
    }
}
