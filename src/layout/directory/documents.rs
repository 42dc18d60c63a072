//! The documents of a model directory: headers, the index, and what describes the model.

use std::io::{self, Write};

use serde_json::{Map, Value as Json, json};

use super::{CONFIG, Directory, View, order};
use crate::codec::{Float, Mode};
use crate::form::{Form, Shown};
use crate::gguf::ModelHeader;
use crate::hf::{Document, HfError};
use crate::layout::counting::CountingWriter;
use crate::layout::{LAYOUT_VERSION, PAGE_BYTES};
use crate::safetensors::{Dtype, InString, LENGTH_WORD_BYTES, write_header_json, write_json};

impl Directory {
    /// Writes everything in front of a file's payload.
    pub(in crate::layout) fn write_header(
        &self,
        file: u32,
        model: &ModelHeader,
        out: &mut impl Write,
    ) -> io::Result<()> {
        let views = self
            .views(file as usize, model)
            .expect("they were made before");
        let length = self.header_bytes[file as usize] - LENGTH_WORD_BYTES;
        out.write_all(&length.to_le_bytes())?;
        let mut json = CountingWriter::new(&mut *out);
        self.write_json(model, &views, &mut json)?;
        let padding = [b' '; PAGE_BYTES as usize];
        let padding = &padding[..(length - json.bytes) as usize];
        out.write_all(padding)
    }

    pub(super) fn write_json<W: Write>(
        &self,
        model: &ModelHeader,
        views: &[View],
        out: &mut W,
    ) -> io::Result<()> {
        let format = match self.form {
            Form::Numbers(_) => "pt",
            Form::Raw | Form::Mlx { .. } => "mlx",
        };
        let mut metadata = vec![("format", format), ("odmoe.layout", LAYOUT_VERSION)];
        if self.form != Form::Raw {
            metadata.push(("odmoe.form", self.form.name()));
        }
        if let Form::Mlx { scales, requant } = self.form {
            metadata.push(("odmoe.scales", Dtype::from(scales).name()));
            if requant {
                metadata.push(("odmoe.requant", "true"));
            }
        }
        if let Some(architecture) = model.architecture() {
            metadata.push(("general.architecture", architecture));
        }
        let sources = |out: &mut InString<'_, W>| {
            let mut comma = "{";
            for view in views {
                out.write_all(comma.as_bytes())?;
                write_json(out, &view.tensor.name)?;
                out.write_all(b":")?;
                write_json(out, &model.tensors[view.source as usize].info.name)?;
                comma = ",";
            }
            out.write_all(if comma == "{" { b"{}" } else { b"}" })
        };
        let order = order(views, model);
        let arrays = order.iter().map(|(view, n)| views[*view].array(*n, model));
        write_header_json(out, &metadata, "odmoe.sources", sources, arrays)
    }

    pub(in crate::layout) fn write_document(
        &self,
        n: u32,
        model: &ModelHeader,
        out: &mut impl Write,
    ) -> io::Result<()> {
        match self.documents.get(n as usize) {
            Some((_, bytes)) => out.write_all(bytes),
            None => self.write_index(model, out),
        }
    }

    /// Writes the index: which file each array lies in.
    pub(super) fn write_index(&self, model: &ModelHeader, out: &mut impl Write) -> io::Result<()> {
        let left_out = self.plan.left_out().iter().map(|(index, reason)| {
            let name = model.tensors[*index as usize].info.name.clone();
            (name, Json::from(*reason))
        });
        let left_out: Map<String, Json> = left_out.collect();
        let mut metadata = json!({"total_size": self.total_bytes});
        if !left_out.is_empty() {
            metadata["odmoe.left_out"] = left_out.into();
        }
        out.write_all(b"{\n  \"metadata\": ")?;
        write_json(out, &metadata)?;
        out.write_all(b",\n  \"weight_map\": {")?;
        let mut comma = "\n    ";
        for (file, weights) in self.plan.files().iter().enumerate() {
            let views = self.views(file, model).expect("they were made before");
            for view in &views {
                for n in 0..view.arrays() {
                    out.write_all(comma.as_bytes())?;
                    write_json(out, &*view.array(n, model).name)?;
                    out.write_all(b": ")?;
                    write_json(out, &weights.name)?;
                    comma = ",\n    ";
                }
            }
        }
        out.write_all(b"\n  }\n}\n")
    }

    pub(super) fn make_documents(&self, model: &ModelHeader) -> Result<Vec<Document>, HfError> {
        let mut config = self.plan.config().clone();
        let dtype = match self.form {
            Form::Raw => None,
            Form::Numbers(float) | Form::Mlx { scales: float, .. } => Some(match float {
                Float::F32 => "float32",
                Float::F16 => "float16",
                Float::Bf16 => "bfloat16",
            }),
        };
        if let Some(dtype) = dtype {
            config.insert("torch_dtype".into(), dtype.into());
        }
        if let Some(quantization) = self.quantization(model)? {
            config.insert("quantization".into(), quantization.clone());
            config.insert("quantization_config".into(), quantization);
        }
        let mut text = serde_json::to_vec_pretty(&config).expect("it is made of JSON's own values");
        text.push(b'\n');
        let mut documents = vec![(CONFIG, text.into())];
        documents.extend(self.plan.documents().iter().cloned());
        Ok(documents)
    }

    /// How each module is quantised.
    fn quantization(&self, model: &ModelHeader) -> Result<Option<Json>, HfError> {
        let mut modules = Map::new();
        let mut any = false;
        for file in 0..self.plan.files().len() {
            for view in self
                .views(file, model)?
                .iter()
                .filter(|v| v.tensor.is_layer)
            {
                let name = &view.tensor.name;
                let module = name.strip_suffix(".weight").unwrap_or(name).to_owned();
                let ggml_type = model.tensors[view.source as usize].info.ggml_type;
                let value = match (self.form, view.shown) {
                    (Form::Raw, _) if view.has_placeholder => {
                        ggml_type.name.to_ascii_lowercase().into()
                    }
                    (Form::Mlx { .. }, Shown::Mlx { mlx, .. }) => json!({
                        "group_size": mlx.group_size,
                        "bits": mlx.bits,
                        "mode": mlx.mode.name(),
                    }),
                    (Form::Mlx { .. }, _) => {
                        modules.insert(module, false.into());
                        continue;
                    }
                    _ => continue,
                };
                any = true;
                modules.insert(module, value);
            }
        }
        Ok(any.then(|| match self.form {
            Form::Raw => json!({"mode": "kquant", "per_tensor": modules}),
            _ => {
                // mlx-lm wants some values for modules that it does not find below.
                let mut all = Map::new();
                all.insert("group_size".into(), 32.into());
                all.insert("bits".into(), 4.into());
                all.insert("mode".into(), Mode::Affine.name().into());
                all.extend(modules);
                all.into()
            }
        }))
    }
}
