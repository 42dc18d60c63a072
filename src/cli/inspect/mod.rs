//! `inspect`: what is in a model, and what the mount would show.
//!
//! The library has the numbers, which `--json` prints; [`picture`] draws them, and [`tables`] lists
//! the tensors of the whole model or of one expert.

mod picture;
mod tables;

use std::str::FromStr;

use odmoe_fs::inspect::{ExpertReport, Report};
use odmoe_fs::model::Model;

use super::failure::{Failure, Result};
use super::form::FormArgs;
use super::screen::Screen;
use super::show::{ShowArgs, warn_of_directory};
use super::{ModelArg, Stop, print, print_json, text};

/// Show what is in a model, and what mounting it would show
///
/// A picture on a terminal, plain text elsewhere.
#[derive(clap::Args)]
pub struct InspectArgs {
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    form: FormArgs,
    #[command(flatten)]
    show: ShowArgs,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// Show where one expert lies: 3,17 is expert 17 of layer 3
    #[arg(long, value_name = "LAYER,EXPERT", conflicts_with = "tensors")]
    expert: Option<ExpertName>,
    /// Print a JSON object
    #[arg(long)]
    pub json: bool,
}

/// Which expert.
#[derive(Clone, Copy)]
struct ExpertName {
    layer: u32,
    expert: u32,
}

impl FromStr for ExpertName {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parse = || {
            let (layer, expert) = text.split_once(',')?;
            Some(Self {
                layer: layer.trim().parse().ok()?,
                expert: expert.trim().parse().ok()?,
            })
        };
        parse().ok_or_else(|| "it must be two numbers, such as 3,17".to_owned())
    }
}

pub fn run(args: &InspectArgs) -> Result<()> {
    let _stop = Stop::at_once(args.json)?;
    let model = args.model.open(args.form.form()?, args.show.show())?;
    warn_of_directory(&model);
    let screen = Screen::of_stdout();
    if let Some(name) = args.expert {
        let report = expert(&model, name)?;
        return if args.json {
            print_json(&report)
        } else {
            print(&tables::expert(&report, &screen))
        };
    }
    let mut report = Report::new(&model);
    if args.tensors {
        report = report.with_tensors(&model);
    }
    if args.json {
        return print_json(&report);
    }
    let mut text = picture::draw(&report, &screen);
    if let Some(tensors) = &report.tensors {
        text += "\n";
        text += &tables::tensors(tensors, &screen);
    }
    print(&text)
}

fn expert(model: &Model, name: ExpertName) -> Result<ExpertReport<'_>> {
    let layout = model.layout();
    if let Some(file) = layout.expert(name.layer, name.expert) {
        return Ok(ExpertReport::new(model, file));
    }
    let layers: Vec<u32> = layout.moe_layers().collect();
    if layers.is_empty() {
        let failure = Failure::new("the model has no routed experts");
        return Err(failure.hint("leave out --expert to see what it has"));
    }
    if !layers.contains(&name.layer) {
        let failure = Failure::new(format!("layer {} has no experts", name.layer));
        return Err(failure.hint(format!("choose from layers {}", text::ranges(&layers))));
    }
    let experts: Vec<u32> = layout.experts_of(name.layer).collect();
    let failure = Failure::new(format!(
        "layer {} has no expert {}",
        name.layer, name.expert
    ));
    Err(failure.hint(format!("choose from experts {}", text::ranges(&experts))))
}
