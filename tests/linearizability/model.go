package main

import (
	"fmt"
	"hash/maphash"
	"math"
	"slices"
	"sort"
	"time"

	"github.com/anishathalye/porcupine"
)

// The state of a group of keys: one number per key, standing for its value. 0: absent.
type state []int32

const absent int32 = 0

type keyValue struct {
	key   int
	value int32
}

// An operation with its keys and values numbered.
type step struct {
	compare, write, observed []keyValue
	succeeded, known         bool
	source                   *operation
}

// apply is the sequential specification: may `s` happen in `before`, and what is the state after?
func apply(before state, s *step) (bool, state) {
	holds := true
	for _, c := range s.compare {
		holds = holds && before[c.key] == c.value
	}
	if s.known {
		if holds != s.succeeded {
			return false, before
		}
		for _, o := range s.observed {
			if before[o.key] != o.value {
				return false, before
			}
		}
	}
	if !holds || len(s.write) == 0 {
		return true, before
	}
	after := slices.Clone(before)
	for _, w := range s.write {
		after[w.key] = w.value
	}
	return true, after
}

var hashSeed = maphash.MakeSeed()

func model(keys int) porcupine.Model {
	return porcupine.Model{
		Init:  func() any { return make(state, keys) },
		Step:  func(before, input, _ any) (bool, any) { return apply(before.(state), input.(*step)) },
		Equal: func(a, b any) bool { return slices.Equal(a.(state), b.(state)) },
		Hash: func(of any) uint64 {
			var hash maphash.Hash
			hash.SetSeed(hashSeed)
			for _, value := range of.(state) {
				hash.WriteByte(byte(value))
				hash.WriteByte(byte(value >> 8))
				hash.WriteByte(byte(value >> 16))
			}
			return hash.Sum64()
		},
		DescribeOperation: func(input, _ any) string { return input.(*step).source.String() },
		DescribeState:     func(of any) string { return fmt.Sprint(of.(state)) },
	}
}

// A group holds the operations on keys that some operation connects. Groups are judged apart from each other:
// linearizability is local to objects, and a group is one object.
type group struct {
	keys       []string
	operations []*operation
}

func groups(history []*operation) []*group {
	parent := map[string]string{}
	var root func(string) string
	root = func(key string) string {
		above, known := parent[key]
		if !known {
			parent[key] = key
			return key
		}
		if above == key {
			return key
		}
		top := root(above)
		parent[key] = top
		return top
	}
	anchor := make([]string, len(history))
	for i, o := range history {
		first := true
		for key := range o.keys() {
			if first {
				anchor[i], first = key, false
			}
			parent[root(key)] = root(anchor[i])
		}
	}
	byRoot := map[string]*group{}
	var all []*group
	for i, o := range history {
		if anchor[i] == "" {
			continue
		}
		top := root(anchor[i])
		g := byRoot[top]
		if g == nil {
			g = &group{}
			byRoot[top] = g
			all = append(all, g)
		}
		g.operations = append(g.operations, o)
	}
	for key := range parent {
		g := byRoot[root(key)]
		g.keys = append(g.keys, key)
	}
	for _, g := range all {
		sort.Strings(g.keys)
	}
	return all
}

// number turns keys and values into numbers, and drops what cannot matter: operations that certainly did not happen,
// and writes of unknown outcome whose values nobody ever saw. Such a write may be placed after everything else, so
// the history is linearizable with it exactly if it is without it, because values are unique and every operation
// that could tell a value from another reports the value it saw.
func (g *group) number() []porcupine.Operation {
	keys := map[string]int{}
	for i, key := range g.keys {
		keys[key] = i
	}
	values := map[string]int32{}
	value := func(text *string) int32 {
		if text == nil {
			return absent
		}
		known, ok := values[*text]
		if !ok {
			known = int32(len(values) + 1)
			values[*text] = known
		}
		return known
	}
	numbered := func(of map[string]*string) []keyValue {
		pairs := make([]keyValue, 0, len(of))
		for key, text := range of {
			pairs = append(pairs, keyValue{keys[key], value(text)})
		}
		return pairs
	}

	seen := map[string]bool{}
	for _, o := range g.operations {
		if o.Outcome != outcomeOk {
			continue
		}
		for _, of := range []map[string]*string{o.Observed, o.Compare} {
			for _, text := range of {
				if text != nil {
					seen[*text] = true
				}
			}
		}
	}
	unseen := func(o *operation) bool {
		for _, text := range o.Write {
			if text == nil || seen[*text] {
				return false
			}
		}
		return true
	}

	var operations []porcupine.Operation
	for _, o := range g.operations {
		if o.Outcome == outcomeNotApplied || (o.Outcome == outcomeUnknown && (!o.changes() || unseen(o))) {
			continue
		}
		s := &step{
			compare:   numbered(o.Compare),
			write:     numbered(o.Write),
			observed:  numbered(o.Observed),
			succeeded: o.Succeeded,
			known:     o.Outcome == outcomeOk,
			source:    o,
		}
		end := o.Return
		if !s.known {
			end = math.MaxInt64
		}
		operations = append(operations, porcupine.Operation{ClientId: o.Client, Input: s, Call: o.Call, Return: end})
	}
	return operations
}

// check judges one group. The result is Unknown if the time did not suffice.
func (g *group) check(timeout time.Duration) porcupine.CheckResult {
	return porcupine.CheckOperationsTimeout(model(len(g.keys)), g.number(), timeout)
}
