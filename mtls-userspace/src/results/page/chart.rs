//! Charts: values in, inline SVG out. One row per path; colours and fonts are the page's.

use std::fmt::Write;

use super::escape;
use crate::results::progress::number;

/// A median between the least and the most.
pub struct Bar<'a> {
    pub name: &'a str,
    pub class: &'static str,
    pub value: f64,
    pub least: f64,
    pub most: f64,
    pub ratio: Option<f64>,
}

/// Quantiles of one path, rising.
pub struct Spread<'a> {
    pub name: &'a str,
    pub class: &'static str,
    pub points: Vec<(&'static str, f64)>,
}

const WIDTH: f64 = 640.0;
const ROW: f64 = 24.0;
/// Where bars end at most; values stand behind.
const RIGHT: f64 = 530.0;

/// Where bars begin: behind the longest name, as wide as its letters are on average at most.
fn left<'n>(names: impl Iterator<Item = &'n str>) -> f64 {
    const LETTER: f64 = 6.3;
    let longest = names.map(|name| name.chars().count()).max().unwrap_or(0);
    (longest as f64 * LETTER + 10.0).clamp(110.0, 280.0)
}

pub fn bars(bars: &[Bar<'_>]) -> String {
    let most = bars.iter().map(|bar| bar.most).fold(0.0, f64::max);
    let left = left(bars.iter().map(|bar| bar.name));
    let x = |value: f64| left + (RIGHT - left) * if most > 0.0 { value.max(0.0) / most } else { 0.0 };
    let mut svg = open(bars.len() as f64 * ROW);
    for (index, bar) in bars.iter().enumerate() {
        let top = index as f64 * ROW;
        let middle = top + ROW / 2.0;
        let (end, least, most) = (x(bar.value), x(bar.least), x(bar.most));
        let ratio = bar.ratio.map_or_else(String::new, |ratio| format!("  ×{ratio:.2}"));
        name(&mut svg, bar.name, middle);
        let _ = write!(
            svg,
            "<rect class={} x={left} y={:.1} width={:.1} height={:.1} rx=3><title>{}: {} ({} to {})</title></rect>\
             <line class=whisker x1={least:.1} x2={most:.1} y1={middle:.1} y2={middle:.1} />\
             <text x={:.1} y={:.1}>{}{ratio}</text>",
            bar.class,
            top + 4.0,
            (end - left).max(1.0),
            ROW - 8.0,
            escape(bar.name),
            number(bar.value),
            number(bar.least),
            number(bar.most),
            most.max(end) + 7.0,
            middle + 4.0,
            number(bar.value),
        );
    }
    svg + "</svg>"
}

/// On a logarithmic scale: tails are many times the median.
pub fn spreads(spreads: &[Spread<'_>]) -> String {
    let values = || spreads.iter().flat_map(|spread| spread.points.iter().map(|(_, value)| value.max(0.1)));
    let lowest = values().fold(f64::INFINITY, f64::min).log10().floor();
    let highest = values().fold(1.0, f64::max).log10().ceil().max(lowest + 1.0);
    let right = WIDTH - 24.0;
    let left = left(spreads.iter().map(|spread| spread.name));
    let x = |value: f64| left + (right - left) * (value.max(0.1).log10() - lowest) / (highest - lowest);
    let height = spreads.len() as f64 * ROW;
    let mut svg = open(height + 16.0);
    for power in lowest as i32..=highest as i32 {
        let value = 10f64.powi(power);
        let at = x(value);
        let _ = write!(
            svg,
            "<line class=grid-line x1={at:.1} x2={at:.1} y1=0 y2={height} />\
             <text class=axis text-anchor=middle x={at:.1} y={:.1}>{}</text>",
            height + 12.0,
            if value >= 1.0 {
                number(value).trim_end_matches(".00").trim_end_matches(".0").to_owned()
            } else {
                value.to_string()
            }
        );
    }
    for (index, spread) in spreads.iter().enumerate() {
        let middle = (index as f64 + 0.5) * ROW;
        name(&mut svg, spread.name, middle);
        let (Some((_, first)), Some((_, last))) = (spread.points.first(), spread.points.last()) else {
            continue;
        };
        let _ = write!(
            svg,
            "<line class={} stroke-width=2 x1={:.1} x2={:.1} y1={middle} y2={middle} />",
            spread.class,
            x(*first),
            x(*last)
        );
        for (position, (quantile, value)) in spread.points.iter().enumerate() {
            // The median is the largest dot.
            let _ = write!(
                svg,
                "<circle class={} cx={:.1} cy={middle} r={}><title>{}, {quantile}: {} µs</title></circle>",
                spread.class,
                x(*value),
                if position == 0 { 5.5 } else { 3.5 },
                escape(spread.name),
                number(*value)
            );
        }
    }
    svg + "</svg>"
}

fn open(height: f64) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=img>")
}

fn name(svg: &mut String, name: &str, middle: f64) {
    let _ = write!(svg, "<text x=0 y={:.1}>{}</text>", middle + 4.0, escape(name));
}
