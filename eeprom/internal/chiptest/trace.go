package chiptest

import (
	"bufio"
	"fmt"
	"os"
	"strings"
)

// An Event is one line of recorded bus traffic: a word, and what belongs to it.
type Event struct {
	Line int
	Verb string
	Args []string
}

// Trace reads recorded traffic: an event a line; what follows a # is a comment.
func Trace(path string) ([]Event, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var list []Event
	sc := bufio.NewScanner(f)
	for line := 1; sc.Scan(); line++ {
		text, _, _ := strings.Cut(sc.Text(), "#")
		if words := strings.Fields(text); len(words) > 0 {
			list = append(list, Event{line, words[0], words[1:]})
		}
	}
	if err := sc.Err(); err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("%s: no events", path)
	}
	return list, nil
}
