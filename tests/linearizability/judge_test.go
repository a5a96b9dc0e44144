package main

import (
	"strings"
	"testing"
	"time"
)

// Each history is planted: the verdict is known beforehand. A checker that cannot say "illegal" proves nothing.
var planted = []struct {
	name    string
	legal   bool
	history string
}{
	{"a read sees the write before it", true, `
{"kind":"put","client":1,"call":1,"return":2,"outcome":"ok","succeeded":true,"write":{"k":"a"},"revision":1}
{"kind":"get","client":2,"call":3,"return":4,"outcome":"ok","succeeded":true,"observed":{"k":"a"},"revision":1,"mod_revisions":{"k":1}}`},
	{"a stale read", false, `
{"kind":"put","client":1,"call":1,"return":2,"outcome":"ok","succeeded":true,"write":{"k":"a"}}
{"kind":"put","client":1,"call":3,"return":4,"outcome":"ok","succeeded":true,"write":{"k":"b"}}
{"kind":"lease","client":2,"call":5,"return":6,"outcome":"ok","succeeded":true,"observed":{"k":"a"}}`},
	{"concurrent with the write, either value is right", true, `
{"kind":"put","client":1,"call":1,"return":2,"outcome":"ok","succeeded":true,"write":{"k":"a"}}
{"kind":"put","client":1,"call":3,"return":9,"outcome":"ok","succeeded":true,"write":{"k":"b"}}
{"kind":"get","client":2,"call":4,"return":5,"outcome":"ok","succeeded":true,"observed":{"k":"a"}}
{"kind":"get","client":2,"call":6,"return":7,"outcome":"ok","succeeded":true,"observed":{"k":"b"}}`},
	{"new value, then the old one again", false, `
{"kind":"put","client":1,"call":1,"return":2,"outcome":"ok","succeeded":true,"write":{"k":"a"}}
{"kind":"put","client":1,"call":3,"return":9,"outcome":"ok","succeeded":true,"write":{"k":"b"}}
{"kind":"get","client":2,"call":4,"return":5,"outcome":"ok","succeeded":true,"observed":{"k":"b"}}
{"kind":"get","client":2,"call":6,"return":7,"outcome":"ok","succeeded":true,"observed":{"k":"a"}}`},
	{"a lost write", false, `
{"kind":"put","client":1,"call":1,"return":2,"outcome":"ok","succeeded":true,"write":{"k":"a"}}
{"kind":"get","client":2,"call":3,"return":4,"outcome":"ok","succeeded":true,"observed":{"k":null}}`},
	{"a write of unknown outcome may take effect late", true, `
{"kind":"put","client":1,"call":1,"return":0,"outcome":"unknown","succeeded":false,"write":{"k":"a"}}
{"kind":"get","client":2,"call":3,"return":4,"outcome":"ok","succeeded":true,"observed":{"k":null}}
{"kind":"get","client":2,"call":5,"return":6,"outcome":"ok","succeeded":true,"observed":{"k":"a"}}`},
	{"a write of unknown outcome takes effect once", false, `
{"kind":"put","client":1,"call":1,"return":0,"outcome":"unknown","succeeded":false,"write":{"k":"a"}}
{"kind":"get","client":2,"call":3,"return":4,"outcome":"ok","succeeded":true,"observed":{"k":"a"}}
{"kind":"put","client":2,"call":5,"return":6,"outcome":"ok","succeeded":true,"write":{"k":"b"}}
{"kind":"get","client":2,"call":7,"return":8,"outcome":"ok","succeeded":true,"observed":{"k":"b"}}
{"kind":"get","client":2,"call":9,"return":10,"outcome":"ok","succeeded":true,"observed":{"k":"a"}}`},
	{"a write of unknown outcome that nobody saw", true, `
{"kind":"put","client":1,"call":1,"return":0,"outcome":"unknown","succeeded":false,"write":{"k":"a"}}
{"kind":"get","client":2,"call":3,"return":4,"outcome":"ok","succeeded":true,"observed":{"k":null}}`},
	{"a write said not to be applied is seen", false, `
{"kind":"put","client":1,"call":1,"return":2,"outcome":"not_applied","succeeded":false,"write":{"k":"a"}}
{"kind":"get","client":2,"call":3,"return":4,"outcome":"ok","succeeded":true,"observed":{"k":"a"}}`},
	{"two compare-and-swaps from the same value both succeed", false, `
{"kind":"put","client":1,"call":1,"return":2,"outcome":"ok","succeeded":true,"write":{"k":"a"}}
{"kind":"cas","client":1,"call":3,"return":9,"outcome":"ok","succeeded":true,"compare":{"k":"a"},"write":{"k":"b"}}
{"kind":"cas","client":2,"call":4,"return":8,"outcome":"ok","succeeded":true,"compare":{"k":"a"},"write":{"k":"c"}}`},
	{"a compare-and-swap fails and shows why", true, `
{"kind":"put","client":1,"call":1,"return":2,"outcome":"ok","succeeded":true,"write":{"k":"a"}}
{"kind":"cas","client":1,"call":3,"return":4,"outcome":"ok","succeeded":false,"compare":{"k":null},"write":{"k":"b"},"observed":{"k":"a"}}
{"kind":"delete","client":1,"call":5,"return":6,"outcome":"ok","succeeded":true,"write":{"k":null},"observed":{"k":"a"}}
{"kind":"cas","client":1,"call":7,"return":8,"outcome":"ok","succeeded":true,"compare":{"k":null},"write":{"k":"c"}}`},
	{"a compare-and-swap fails although its value stood there", false, `
{"kind":"put","client":1,"call":1,"return":2,"outcome":"ok","succeeded":true,"write":{"k":"a"}}
{"kind":"cas","client":1,"call":3,"return":4,"outcome":"ok","succeeded":false,"compare":{"k":"a"},"write":{"k":"b"},"observed":{"k":"a"}}`},
	{"half of a transaction is seen", false, `
{"kind":"txn","client":1,"call":1,"return":9,"outcome":"ok","succeeded":true,"write":{"k":"a","l":"b"}}
{"kind":"txn","client":2,"call":3,"return":4,"outcome":"ok","succeeded":true,"observed":{"k":"a","l":null}}`},
	{"a transaction compares one key and writes another", true, `
{"kind":"put","client":1,"call":1,"return":2,"outcome":"ok","succeeded":true,"write":{"k":"a"}}
{"kind":"txn","client":1,"call":3,"return":4,"outcome":"ok","succeeded":true,"compare":{"k":"a"},"write":{"l":"b"}}
{"kind":"get","client":2,"call":5,"return":6,"outcome":"ok","succeeded":true,"observed":{"l":"b"}}`},
	{"writes skew across two keys", false, `
{"kind":"txn","client":1,"call":1,"return":9,"outcome":"ok","succeeded":true,"compare":{"k":null},"write":{"l":"b"}}
{"kind":"txn","client":2,"call":2,"return":8,"outcome":"ok","succeeded":true,"compare":{"l":null},"write":{"k":"a"}}`},
	{"two writes share a revision", false, `
{"kind":"put","client":1,"call":1,"return":2,"outcome":"ok","succeeded":true,"write":{"k":"a"},"revision":7}
{"kind":"put","client":1,"call":3,"return":4,"outcome":"ok","succeeded":true,"write":{"l":"b"},"revision":7}`},
	{"a later write with a smaller revision", false, `
{"kind":"put","client":1,"call":1,"return":2,"outcome":"ok","succeeded":true,"write":{"k":"a"},"revision":7}
{"kind":"put","client":1,"call":3,"return":4,"outcome":"ok","succeeded":true,"write":{"l":"b"},"revision":6}`},
	{"a value shown with another revision than it was written at", false, `
{"kind":"put","client":1,"call":1,"return":2,"outcome":"ok","succeeded":true,"write":{"k":"a"},"revision":7}
{"kind":"get","client":1,"call":3,"return":4,"outcome":"ok","succeeded":true,"observed":{"k":"a"},"revision":9,"mod_revisions":{"k":8}}`},
	{"an eventual read may be stale", true, `
{"kind":"put","client":1,"call":1,"return":2,"outcome":"ok","succeeded":true,"write":{"k":"a"},"revision":7}
{"kind":"eventual","client":2,"call":3,"return":4,"outcome":"ok","succeeded":true,"observed":{"k":null},"revision":6}`},
	{"an eventual read older than asked for", false, `
{"kind":"eventual","client":2,"call":3,"return":4,"outcome":"ok","succeeded":true,"observed":{"k":null},"revision":6,"min_revision":7}`},
	{"an eventual read goes back in time", false, `
{"kind":"eventual","client":2,"call":1,"return":2,"outcome":"ok","succeeded":true,"observed":{"k":null},"revision":6}
{"kind":"eventual","client":2,"call":3,"return":4,"outcome":"ok","succeeded":true,"observed":{"k":null},"revision":5}`},
	{"an eventual read shows what nobody wrote", false, `
{"kind":"eventual","client":2,"call":1,"return":2,"outcome":"ok","succeeded":true,"observed":{"k":"x"},"revision":6,"mod_revisions":{"k":5}}`},
}

func TestPlantedHistoriesGetTheirVerdict(t *testing.T) {
	for _, p := range planted {
		t.Run(p.name, func(t *testing.T) {
			history, err := readHistory(strings.NewReader(strings.TrimSpace(p.history)))
			if err != nil {
				t.Fatal(err)
			}
			v := judge(history, time.Minute)
			legal := len(v.illegal) == 0 && len(v.revisions) == 0
			if len(v.undecided) > 0 || legal != p.legal {
				t.Errorf("judged legal: %v, planted legal: %v, %v", legal, p.legal, v)
			}
		})
	}
}

func TestKeysJoinedByATransactionAreJudgedTogether(t *testing.T) {
	history, err := readHistory(strings.NewReader(`{"kind":"get","client":1,"call":1,"return":2,"outcome":"ok","succeeded":true,"observed":{"a":null}}
{"kind":"txn","client":1,"call":1,"return":2,"outcome":"ok","succeeded":true,"compare":{"a":null},"write":{"b":"x"}}
{"kind":"get","client":1,"call":1,"return":2,"outcome":"ok","succeeded":true,"observed":{"c":null}}
{"kind":"txn","client":1,"call":1,"return":2,"outcome":"ok","succeeded":true,"compare":{"d":null},"write":{"b":"y"}}`))
	if err != nil {
		t.Fatal(err)
	}
	found := groups(history)
	if len(found) != 2 || strings.Join(found[0].keys, "") != "abd" || strings.Join(found[1].keys, "") != "c" {
		t.Errorf("groups: %v", found)
	}
}

func TestAHistoryThatCannotBeReadIsAnError(t *testing.T) {
	for _, text := range []string{
		`{"kind":"get"`,
		`{"kind":"get","outcome":"maybe"}`,
		`{"kind":"get","outcome":"ok","surprise":1}`,
		`{"kind":"get","outcome":"ok","call":5,"return":4}`,
	} {
		if _, err := readHistory(strings.NewReader(text)); err == nil {
			t.Errorf("accepted: %s", text)
		}
	}
}
