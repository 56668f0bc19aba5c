//! Configuration fragments: merged, and checked against what the kernel made of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// Symbol → value as in `.config`; `n` for "is not set".
pub type Symbols = BTreeMap<String, String>;

/// Reads fragments; a later one overrides an earlier one.
pub fn merge(fragments: &[PathBuf]) -> Result<Symbols> {
    let mut symbols = Symbols::new();
    for fragment in fragments {
        let text = fs::read_to_string(fragment)
            .with_context(|| format!("cannot read {}", fragment.display()))?;
        symbols.extend(parse(&text).with_context(|| format!("in {}", fragment.display()))?);
    }
    Ok(symbols)
}

/// The symbols as a configuration file.
pub fn text(symbols: &Symbols) -> String {
    symbols
        .iter()
        .map(|(symbol, value)| match value.as_str() {
            "n" => format!("# {symbol} is not set\n"),
            _ => format!("{symbol}={value}\n"),
        })
        .collect()
}

/// Compares with the configuration that the kernel's own tools made: a symbol whose dependencies
/// are missing is dropped by them silently, and must not be missed only at run time.
pub fn check(wanted: &Symbols, config: &str) -> Result<()> {
    let made = parse(config).context("in the kernel's .config")?;
    let missing: Vec<String> = wanted
        .iter()
        .filter_map(|(symbol, value)| {
            let got = made.get(symbol).map_or("n", String::as_str);
            (got != value).then(|| format!("{symbol}: wanted {value}, got {got}"))
        })
        .collect();
    if !missing.is_empty() {
        bail!(
            "the kernel cannot be configured as asked:\n{}",
            missing.join("\n")
        );
    }
    Ok(())
}

fn parse(text: &str) -> Result<Symbols> {
    let mut symbols = Symbols::new();
    for line in text.lines().map(str::trim) {
        if let Some((symbol, value)) = line.split_once('=').filter(|_| !line.starts_with('#')) {
            symbols.insert(symbol.to_owned(), value.to_owned());
        } else if let Some(symbol) = line
            .strip_prefix("# ")
            .and_then(|rest| rest.strip_suffix(" is not set"))
        {
            symbols.insert(symbol.to_owned(), "n".to_owned());
        } else if !line.is_empty() && !line.starts_with('#') {
            bail!("not a configuration line: {line}");
        }
    }
    Ok(symbols)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_fragments_win_and_text_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        fs::write(&a, "# why\nCONFIG_A=y\nCONFIG_B=\"x=y\"\n\n").unwrap();
        fs::write(&b, "# CONFIG_A is not set\nCONFIG_N=8\n").unwrap();
        let symbols = merge(&[a, b]).unwrap();
        assert_eq!(symbols["CONFIG_A"], "n");
        assert_eq!(symbols["CONFIG_B"], "\"x=y\"");
        assert_eq!(parse(&text(&symbols)).unwrap(), symbols);
    }

    #[test]
    fn every_symbol_that_did_not_make_it_is_listed() {
        let wanted = parse("CONFIG_A=y\nCONFIG_B=8\n# CONFIG_C is not set\nCONFIG_D=y\n").unwrap();
        check(&wanted, "CONFIG_A=y\nCONFIG_B=8\nCONFIG_D=y\n").unwrap();
        let error = check(&wanted, "CONFIG_A=y\nCONFIG_B=9\nCONFIG_C=y\n")
            .unwrap_err()
            .to_string();
        assert!(error.contains("CONFIG_B: wanted 8, got 9"), "{error}");
        assert!(error.contains("CONFIG_C: wanted n, got y"), "{error}");
        assert!(error.contains("CONFIG_D: wanted y, got n"), "{error}");
        assert!(!error.contains("CONFIG_A"), "{error}");
    }

    #[test]
    fn a_line_that_is_no_configuration_is_refused() {
        assert!(parse("CONFIG_A y\n").is_err());
    }
}
