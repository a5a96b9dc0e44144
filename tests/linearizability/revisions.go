package main

import (
	"fmt"
	"sort"
)

// checkRevisions tests what a linearizability checker cannot see: that revisions tell the order of the writes, and
// that eventual reads show a committed state no older than asked for. It relies on unique values.
func checkRevisions(history []*operation) []string {
	var violations []string
	violation := func(format string, arguments ...any) {
		violations = append(violations, fmt.Sprintf(format, arguments...))
	}

	writtenAt := map[string]uint64{} // value -> revision, of acknowledged writes
	writtenBy := map[string]*operation{}
	byRevision := map[uint64]*operation{}
	var writes []*operation
	for _, o := range history {
		for _, text := range o.Write {
			if text == nil {
				continue
			}
			if other := writtenBy[*text]; other != nil && other != o {
				violation("value %q is written twice, the history cannot be judged: %v and %v", *text, other, o)
			}
			writtenBy[*text] = o
			if o.Outcome == outcomeOk && o.Succeeded {
				writtenAt[*text] = o.Revision
			}
		}
		if o.Outcome != outcomeOk || !o.Succeeded || !o.changes() || o.Revision == 0 || o.changedNothing() {
			continue
		}
		if other := byRevision[o.Revision]; other != nil {
			violation("two writes share revision %d: %v and %v", o.Revision, other, o)
		}
		byRevision[o.Revision] = o
		writes = append(writes, o)
	}

	// Among acknowledged writes ordered by call, each revision exceeds those of all writes that had returned before.
	byReturn := append([]*operation(nil), writes...)
	sort.Slice(writes, func(i, j int) bool { return writes[i].Call < writes[j].Call })
	sort.Slice(byReturn, func(i, j int) bool { return byReturn[i].Return < byReturn[j].Return })
	var latest *operation
	returned := 0
	for _, o := range writes {
		for returned < len(byReturn) && byReturn[returned].Return < o.Call {
			if latest == nil || byReturn[returned].Revision > latest.Revision {
				latest = byReturn[returned]
			}
			returned++
		}
		if latest != nil && o.Revision <= latest.Revision {
			violation("a later write has a smaller revision: %v and then %v", latest, o)
		}
	}

	lastOfClient := map[int]*operation{}
	for _, o := range history {
		if o.Outcome != outcomeOk {
			continue
		}
		for key, text := range o.Observed {
			at := o.ModRevisions[key]
			if text == nil || at == 0 {
				continue
			}
			if expected, known := writtenAt[*text]; known && expected != at {
				violation("%q was written at revision %d but is shown with %d: %v", *text, expected, at, o)
			}
			if o.Revision != 0 && at > o.Revision {
				violation("a value from after the answer's own revision: %v", o)
			}
			if by := writtenBy[*text]; by == nil || by.Outcome == outcomeNotApplied {
				violation("a value that nobody wrote, or whose write was said not to be applied: %v", o)
			}
		}
		if o.Kind != kindEventual {
			continue
		}
		if o.Revision < o.MinRevision {
			violation("older than asked for: %v", o)
		}
		if last := lastOfClient[o.Client]; last != nil && last.Return < o.Call && o.Revision < last.Revision {
			violation("an eventual read went back in time: %v and then %v", last, o)
		}
		lastOfClient[o.Client] = o
	}
	return violations
}

// changedNothing tells whether the operation only deleted keys that it saw to be absent: that raises no revision.
func (o *operation) changedNothing() bool {
	for key, text := range o.Write {
		if text != nil {
			return false
		}
		if before, seen := o.Observed[key]; !seen || before != nil {
			return false
		}
	}
	return true
}
