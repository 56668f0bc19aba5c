//! Which objects a configuration compiles.
//!
//! Make has a rule for an object of any C file in the tree, wanted or not: the makefile beside it
//! has to be asked.

/// Whether the makefile of an object's folder (`Documentation/kbuild/makefiles.rst` in the kernel's
/// source) names it, under no condition or one that the configuration fulfils.
///
/// `name` is the object's without its folder, `config` the content of `.config`.
pub fn compiled(makefile: &str, config: &str, name: &str) -> bool {
    let joined = makefile.replace("\\\n", " ");
    joined.lines().any(|line| {
        let Some((list, objects)) = line.split_once('=') else {
            return false;
        };
        objects.split_whitespace().any(|object| object == name)
            && symbol(list).is_none_or(|symbol| {
                [format!("{symbol}=y"), format!("{symbol}=m")]
                    .iter()
                    .any(|set| config.lines().any(|line| line == set))
            })
    })
}

/// The symbol that a list of objects depends on.
fn symbol(list: &str) -> Option<&str> {
    let symbol = &list[list.find("CONFIG_")?..];
    let end = symbol.find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
    Some(&symbol[..end.unwrap_or(symbol.len())])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_compiled_if_it_is_named_and_its_symbol_set() {
        let makefile = "mmu-y := nommu.o\nmmu-$(CONFIG_MMU) := memory.o \\\n\tmprotect.o\n\
                        obj-$(CONFIG_MEMTEST)\t\t+= memtest.o\nobj-y += $(mmu-y) gup.o\n\
                        obj-$(subst m,y,$(CONFIG_HMM)) += hmm.o\n# slub.o\n";
        let config = "CONFIG_MMU=y\n# CONFIG_MEMTEST is not set\nCONFIG_HMM=m\n";
        for (name, is) in [
            ("memory.o", true),
            ("mprotect.o", true),
            ("gup.o", true),
            ("hmm.o", true),
            ("memtest.o", false),
            ("slub.o", false),
            ("mprotec.o", false),
        ] {
            assert_eq!(compiled(makefile, config, name), is, "{name}");
        }
    }
}
