-- The audit stream, PREFIX:audit. It is cut to a number of entries and to a time, about, as far as whole nodes of the
-- stream go; readers leave out what is too old. That of a farm where nothing is done any more expires.

-- Append the payloads of entries. `limits` are the most entries and the milliseconds that one is kept; '' to append
-- nothing.
local function audit_note(prefix, limits, entries, now)
  local most, keep_ms = string.match(limits, '^(%d+) (%d+)$')
  if not most then
    return
  end
  local stream = prefix .. ':audit'
  for _, entry in ipairs(entries) do
    redis.call('XADD', stream, 'MAXLEN', '~', most, '*', 'p', entry)
  end
  -- pcall: a user of Redis that may not do this, as none needed to before there was this stream, still commits.
  redis.pcall('XTRIM', stream, 'MINID', '~', string.format('%.0f', math.max(0, now - tonumber(keep_ms))))
  redis.call('PEXPIRE', stream, keep_ms)
end
