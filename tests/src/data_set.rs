//! The real data of the demo; its origin is told in `tests/data/public-suffixes`.

/// A key with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it stands in the store.
    pub key: String,
    /// What is known of it, as JSON.
    pub value: String,
}

/// The Public Suffix List: one entry for each rule, with its section and the comment above it.
#[must_use]
pub fn public_suffixes() -> Vec<Entry> {
    parse(include_str!("../data/public-suffixes/public_suffix_list.dat"))
}

fn parse(list: &str) -> Vec<Entry> {
    let mut section = "";
    let mut comment = String::new();
    let mut entries = Vec::new();
    for line in list.lines().map(str::trim) {
        if let Some(text) = line.strip_prefix("//") {
            let text = text.trim();
            if let Some(name) = text.strip_prefix("===BEGIN ").and_then(|rest| rest.strip_suffix(" DOMAINS===")) {
                section = name;
            }
            text.clone_into(&mut comment);
        } else if !line.is_empty() {
            let value = serde_json::json!({ "section": section, "registry": comment }).to_string();
            entries.push(Entry { key: format!("suffix/{line}"), value });
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_carries_its_section_and_comment() {
        let list = "// ===BEGIN ICANN DOMAINS===\n\n// ac : http://nic.ac\nac\ncom.ac\n// ===BEGIN PRIVATE DOMAINS===\n// Us\n*.us.example\n";
        let values: Vec<_> = parse(list).into_iter().map(|entry| (entry.key, entry.value)).collect();
        let (icann, private) = (
            r#"{"registry":"ac : http://nic.ac","section":"ICANN"}"#.to_owned(),
            r#"{"registry":"Us","section":"PRIVATE"}"#.to_owned(),
        );
        assert_eq!(
            values,
            [
                ("suffix/ac".to_owned(), icann.clone()),
                ("suffix/com.ac".to_owned(), icann),
                ("suffix/*.us.example".to_owned(), private)
            ]
        );
    }

    #[test]
    fn the_list_has_thousands_of_different_keys() {
        let entries = public_suffixes();
        let keys: std::collections::BTreeSet<_> = entries.iter().map(|entry| &entry.key).collect();
        assert!(keys.len() > 9_000 && keys.len() == entries.len(), "{} keys, {} entries", keys.len(), entries.len());
    }
}
