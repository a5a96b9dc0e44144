// The judge of the fault tests: reads histories (JSON lines, see operation.go) from the files named and says whether
// they are linearizable, with Porcupine as the checker. Exit status 0: yes; 1: no; 2: not judged.
package main

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"
)

// At most this many violations of one kind are printed in full.
const shown = 5

type verdict struct {
	operations, groups, unknown int
	illegal, undecided          []*group
	revisions                   []string
}

func judge(history []*operation, timeout time.Duration) verdict {
	linearizable := make([]*operation, 0, len(history))
	v := verdict{operations: len(history)}
	for _, o := range history {
		if o.Outcome == outcomeUnknown {
			v.unknown++
		}
		if o.Kind != kindEventual {
			linearizable = append(linearizable, o)
		}
	}
	all := groups(linearizable)
	v.groups = len(all)
	v.revisions = checkRevisions(history)

	work := make(chan *group)
	var lock sync.Mutex
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Add(1)
		go func() {
			defer workers.Done()
			for g := range work {
				result := g.check(timeout)
				lock.Lock()
				switch result {
				case porcupine.Illegal:
					v.illegal = append(v.illegal, g)
				case porcupine.Unknown:
					v.undecided = append(v.undecided, g)
				}
				lock.Unlock()
			}
		}()
	}
	for _, g := range all {
		work <- g
	}
	close(work)
	workers.Wait()
	return v
}

func (v verdict) report(out *os.File, picture string) int {
	for i, text := range v.revisions {
		if i == shown {
			fmt.Fprintf(out, "... and %d more\n", len(v.revisions)-shown)
			break
		}
		fmt.Fprintln(out, "VIOLATION:", text)
	}
	for i, g := range v.illegal {
		fmt.Fprintf(out, "VIOLATION: not linearizable: keys %v, %d operations\n", g.keys, len(g.operations))
		if i == 0 && picture != "" {
			draw(g, picture)
			fmt.Fprintln(out, "a picture of it:", picture)
		}
	}
	for _, g := range v.undecided {
		fmt.Fprintf(out, "NOT JUDGED within the time: keys %v, %d operations\n", g.keys, len(g.operations))
	}
	fmt.Fprintf(out, "judged %d operations (%d of unknown outcome) in %d groups: ", v.operations, v.unknown, v.groups)
	switch {
	case len(v.illegal) > 0 || len(v.revisions) > 0:
		fmt.Fprintln(out, "VIOLATED")
		return 1
	case len(v.undecided) > 0:
		fmt.Fprintln(out, "UNDECIDED")
		return 2
	case v.operations == 0:
		fmt.Fprintln(out, "EMPTY")
		return 2
	}
	fmt.Fprintln(out, "linearizable")
	return 0
}

func draw(g *group, path string) {
	m := model(len(g.keys))
	_, info := porcupine.CheckOperationsVerbose(m, g.number(), 10*time.Second)
	if err := porcupine.VisualizePath(m, info, path); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
}

func main() {
	timeout := flag.Duration("timeout", time.Minute, "longest time to judge one group of keys")
	picture := flag.String("picture", "", "where to draw the first history that is not linearizable, as HTML")
	flag.Parse()
	if flag.NArg() == 0 {
		fmt.Fprintln(os.Stderr, "usage: d-engine-judge [--timeout 1m] [--picture file.html] history.jsonl ...")
		os.Exit(2)
	}
	status := 0
	for _, path := range flag.Args() {
		file, err := os.Open(path)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
		history, err := readHistory(file)
		file.Close()
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", path, err)
			os.Exit(2)
		}
		status = worse(status, judge(history, *timeout).report(os.Stdout, *picture))
	}
	os.Exit(status)
}

// worse combines exit statuses: a violation outweighs a history that was not judged.
func worse(a, b int) int {
	if a == 1 || b == 1 {
		return 1
	}
	return max(a, b)
}
