//! Path templates of AuthorizationPolicy: `{*}` is exactly one non-empty segment, `{**}` any run of characters,
//! slashes included, also none; `{**}` is the last operator, literals may follow.

#[derive(Debug, PartialEq, Eq)]
pub(super) struct PathTemplate(Vec<Piece>);

#[derive(Debug, PartialEq, Eq)]
enum Piece {
    Literal(Box<str>),
    Segment,
    Rest,
}

impl PathTemplate {
    /// `None` when the template breaks the rules: a stray brace or star, an operator that is not a whole segment, an
    /// operator after `{**}`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut literal = String::new();
        let mut segments = text.split('/');
        if !segments.next()?.is_empty() {
            return None;
        }
        for segment in segments {
            literal.push('/');
            let operator = match segment {
                "{*}" => Piece::Segment,
                "{**}" => Piece::Rest,
                s if s.contains(['{', '}', '*']) => return None,
                s => {
                    literal.push_str(s);
                    continue;
                }
            };
            if pieces.contains(&Piece::Rest) {
                return None;
            }
            pieces.push(Piece::Literal(std::mem::take(&mut literal).into()));
            pieces.push(operator);
        }
        if !literal.is_empty() {
            pieces.push(Piece::Literal(literal.into()));
        }
        Some(Self(pieces))
    }

    pub(super) fn matches(&self, path: &str) -> bool {
        let mut rest = path;
        for (i, piece) in self.0.iter().enumerate() {
            match piece {
                Piece::Literal(text) => match rest.strip_prefix(&**text) {
                    Some(after) => rest = after,
                    None => return false,
                },
                Piece::Segment => {
                    let end = rest.find('/').unwrap_or(rest.len());
                    if end == 0 {
                        return false;
                    }
                    rest = &rest[end..];
                }
                // The last operator: whatever lies between here and the literal end, if there is one.
                Piece::Rest => {
                    return match self.0.get(i + 1) {
                        Some(Piece::Literal(text)) => rest.ends_with(&**text),
                        Some(Piece::Segment | Piece::Rest) | None => true,
                    };
                }
            }
        }
        rest.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_match_as_documented() {
        for (template, path, want) in [
            ("/a/{*}/b", "/a//b", false),
            ("/a/{*}/b", "/a/x/b", true),
            ("/a/{*}/b", "/a/x/y/b", false),
            ("/a/{*}", "/a/x", true),
            ("/a/{*}", "/a/", false),
            ("/a/{**}", "/a/", true),
            ("/a/{**}", "/a/x/y", true),
            ("/a/{**}", "/a", false),
            ("/s/{**}/c", "/s//c", true),
            ("/s/{**}/c", "/s/x/y/c", true),
            ("/s/{**}/c", "/s/c", false),
            ("/{*}/x/{**}", "/t/x/", true),
        ] {
            let parsed = PathTemplate::parse(template).expect("valid");
            assert_eq!(parsed.matches(path), want, "{template} on {path}");
        }
        for bad in ["/foo/{*}.txt", "/a{*}", "/{**}/{*}", "/a*", "a", "/{x}"] {
            assert!(PathTemplate::parse(bad).is_none(), "{bad}");
        }
    }
}
