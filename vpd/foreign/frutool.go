package foreign

import (
	"encoding/hex"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/BurntSushi/toml"

	"nvstore.dev/vpd/internal/spec"
)

// fruTool reads the TOML of fru-tool, version 4 ("frutool sample" prints one).
func fruTool(text []byte, o *Options) (*result, error) {
	var doc map[string]any
	if _, err := toml.Decode(string(text), &doc); err != nil {
		return nil, spec.Errorf("", "%s", strings.TrimPrefix(err.Error(), "toml: "))
	}
	r := &result{}
	r.spec.Add("format", "fru")
	t := &tomlReader{r: r, o: o}
	common := t.section("", doc, "common")
	t.version(common)
	size := common.uint("size", 256<<10)
	include := map[string]bool{}
	for _, name := range []string{"internal", "chassis", "board", "product", "multirecord"} {
		include[name] = common.boolean("include_"+name, true)
	}
	common.rest()
	if include["multirecord"] && doc["multirecord"] != nil {
		t.fail("multirecord", "fru-tool doesn't say what is in it")
	}
	for _, name := range []string{"internal", "chassis", "board", "product"} {
		s := t.section("", doc, name)
		if s.m != nil && include[name] {
			t.area(name, s)
		}
	}
	for name := range doc {
		if !slices.Contains([]string{"common", "internal", "chassis", "board", "product", "multirecord"}, name) {
			t.fail(name, "unknown section")
		}
	}
	if t.err != nil {
		return nil, t.err
	}
	if size > 0 {
		r.spec.Add("size", size)
		r.spec.Add("fill", "0x00") // as fru-tool fills up
	}
	return r, nil
}

// A tomlReader keeps the first error.
type tomlReader struct {
	r   *result
	o   *Options
	err error
}

func (t *tomlReader) fail(path, format string, args ...any) {
	if t.err == nil {
		t.err = spec.Errorf(path, format, args...)
	}
}

type tomlSection struct {
	t    *tomlReader
	path string
	m    map[string]any
	used map[string]bool
}

func (t *tomlReader) section(path string, doc map[string]any, name string) *tomlSection {
	s := &tomlSection{t: t, path: spec.Join(path, name), used: map[string]bool{}}
	v, ok := doc[name]
	if !ok {
		return s
	}
	if s.m, ok = v.(map[string]any); !ok {
		t.fail(s.path, "want a section")
	}
	return s
}

func (s *tomlSection) get(name string) any {
	s.used[name] = true
	return s.m[name]
}

func (s *tomlSection) uint(name string, max int64) int64 {
	v := s.get(name)
	n, ok := v.(int64)
	if v != nil && !ok || n < 0 || n > max {
		s.t.fail(spec.Join(s.path, name), "want a number from 0 to %d", max)
	}
	return n
}

func (s *tomlSection) boolean(name string, missing bool) bool {
	v := s.get(name)
	b, ok := v.(bool)
	if v != nil && !ok {
		s.t.fail(spec.Join(s.path, name), "want true or false")
	}
	return b || v == nil && missing
}

func (s *tomlSection) text(name string) string {
	v := s.get(name)
	text, ok := v.(string)
	if v != nil && !ok {
		s.t.fail(spec.Join(s.path, name), "want a string")
	}
	return text
}

func (s *tomlSection) rest() {
	for _, name := range slices.Sorted(maps.Keys(s.m)) {
		if !s.used[name] {
			s.t.fail(spec.Join(s.path, name), "unknown")
		}
	}
}

func (t *tomlReader) version(s *tomlSection) {
	if v := s.get("format_version"); v != nil && v != int64(1) {
		t.fail(s.path+".format_version", "want 1")
	}
}

// fruToolNames maps fru-tool's names to those of a spec.
var fruToolNames = map[string][][2]string{
	"chassis": {{"part_number", "part_number"}, {"serial_number", "serial_number"}},
	"board": {{"manufacturer", "manufacturer"}, {"product_name", "product_name"}, {"serial_number", "serial_number"},
		{"part_number", "part_number"}, {"fru_file_id", "file_id"}},
	"product": {{"manufacturer", "manufacturer"}, {"product_name", "product_name"}, {"part_number", "part_number"},
		{"product_version", "version"}, {"serial_number", "serial_number"}, {"asset_tag", "asset_tag"}, {"fru_file_id", "file_id"}},
}

func (t *tomlReader) area(name string, s *tomlSection) {
	t.version(s)
	if name == "internal" {
		t.internal(s)
		return
	}
	area := spec.Object{}
	if name == "chassis" {
		area.Add("type", spec.Byte(byte(s.uint("type", 0xff))))
	} else {
		area.Add("language", s.uint("language_code", 0xff))
	}
	if name == "board" {
		t.date(s, &area)
	}
	for _, n := range fruToolNames[name] {
		if text := s.text(n[0]); text != "" {
			area.Add(n[1], text)
		}
	}
	custom := []string{}
	list, ok := s.get("custom_fields").([]any)
	if s.m["custom_fields"] != nil && !ok {
		t.fail(s.path+".custom_fields", "want a list")
	}
	for i, v := range list {
		text, ok := v.(string)
		if !ok {
			t.fail(s.path+".custom_fields["+strconv.Itoa(i)+"]", "want a string")
		}
		custom = append(custom, text)
	}
	if len(custom) > 0 {
		area.Add("custom", custom)
	}
	s.rest()
	t.r.spec.Add(name, area)
}

// date: text, or a date of TOML. 1996-01-01 00:00 is none.
func (t *tomlReader) date(s *tomlSection, area *spec.Object) {
	var when time.Time
	switch v := s.get("mfg_date_time").(type) {
	case nil:
		return
	case time.Time:
		when = v
		if v.Location().String() == "UTC" || strings.HasPrefix(v.Location().String(), "datetime-local") {
			when = time.Date(v.Year(), v.Month(), v.Day(), v.Hour(), v.Minute(), v.Second(), 0, time.UTC)
		}
	case string:
		var err error
		if when, err = time.Parse("2006-01-02 15:04", v); err != nil {
			t.fail(s.path+".mfg_date_time", "%q, want YYYY-MM-DD HH:MM", v)
			return
		}
	case int64:
		if v == 0 {
			return
		}
		t.fail(s.path+".mfg_date_time", "want a date")
	default:
		t.fail(s.path+".mfg_date_time", "want a date")
	}
	if text := when.UTC().Format(fruDate); text != "1996-01-01T00:00Z" {
		area.Add("date", text)
	}
}

func (t *tomlReader) internal(s *tomlSection) {
	var data []byte
	switch v := s.get("data").(type) {
	case nil:
	case string:
		data = []byte(v)
	case []any:
		for i, x := range v {
			n, ok := x.(int64)
			if !ok || n < 0 || n > 0xff {
				t.fail(s.path+".data["+strconv.Itoa(i)+"]", "want a number from 0 to 255")
			}
			data = append(data, byte(n))
		}
	default:
		t.fail(s.path+".data", "want a list of numbers, or a string")
	}
	if name := s.text("file"); name != "" && len(data) == 0 && t.err == nil {
		if t.o.ReadFile == nil {
			t.fail(s.path+".file", "no files are read here")
		} else if data, t.err = t.o.ReadFile(name); t.err != nil {
			return
		}
	}
	s.rest()
	if len(data) > 0 {
		t.r.spec.Add("internal", typedValue{Type: "hex", Data: hex.EncodeToString(data)})
	}
}
