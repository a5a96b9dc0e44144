package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
)

// An operation is one line of a history: what a client asked, and what it was told.
//
// Every kind of operation is written in one form: if all comparisons hold, the writes are applied at once; what was
// observed is the state before the writes. A put has no comparison, a get no write, a compare-and-swap one of each.
// A null value stands for an absent key.
type operation struct {
	Kind   string `json:"kind"` // "eventual" for eventual reads, anything else is judged for linearizability
	Client int    `json:"client"`
	// Monotonic nanoseconds. Return is meaningless when the outcome is unknown.
	Call    int64  `json:"call"`
	Return  int64  `json:"return"`
	Outcome string `json:"outcome"` // "ok", "not_applied" or "unknown"

	Compare  map[string]*string `json:"compare,omitempty"`
	Write    map[string]*string `json:"write,omitempty"`
	Observed map[string]*string `json:"observed,omitempty"`
	// Whether the comparisons held; true when there is none.
	Succeeded bool `json:"succeeded"`

	// Revision of the answer's header; 0 if unknown.
	Revision uint64 `json:"revision,omitempty"`
	// Lower bound an eventual read asked for.
	MinRevision uint64 `json:"min_revision,omitempty"`
	// Revisions at which the observed keys were last written.
	ModRevisions map[string]uint64 `json:"mod_revisions,omitempty"`

	line int
}

const (
	outcomeOk         = "ok"
	outcomeNotApplied = "not_applied"
	outcomeUnknown    = "unknown"
	kindEventual      = "eventual"
)

func (o *operation) changes() bool { return len(o.Write) > 0 }

func (o *operation) keys() map[string]struct{} {
	keys := map[string]struct{}{}
	for _, of := range []map[string]*string{o.Compare, o.Write, o.Observed} {
		for key := range of {
			keys[key] = struct{}{}
		}
	}
	return keys
}

func (o *operation) String() string {
	text, err := json.Marshal(o)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("line %d: %s", o.line, text)
}

// readHistory reads JSON lines. A history it does not understand is an error, never a shorter history.
func readHistory(from io.Reader) ([]*operation, error) {
	var history []*operation
	scanner := bufio.NewScanner(from)
	scanner.Buffer(nil, 16<<20)
	for line := 1; scanner.Scan(); line++ {
		decoder := json.NewDecoder(bytes.NewReader(scanner.Bytes()))
		decoder.DisallowUnknownFields()
		o := &operation{line: line}
		if err := decoder.Decode(o); err != nil {
			return nil, fmt.Errorf("line %d: %w", line, err)
		}
		switch o.Outcome {
		case outcomeOk:
			if o.Return < o.Call {
				return nil, fmt.Errorf("line %d: returned before it was called", line)
			}
		case outcomeNotApplied, outcomeUnknown:
		default:
			return nil, fmt.Errorf("line %d: outcome %q", line, o.Outcome)
		}
		history = append(history, o)
	}
	return history, scanner.Err()
}
