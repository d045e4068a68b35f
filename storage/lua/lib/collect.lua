-- What holds refs and blobs, and the end of both. PREFIX:children:REF are the refs on top of a ref, PREFIX:users:DIGEST
-- those whose blob it is. What is in these sets and is no record any more counts for nothing, and is taken out.
-- PREFIX:deleting has the objects that no record names any more, by when they may be deleted.
-- include: lease

local function children_key(prefix, id)
  return prefix .. ':children:' .. id
end

local function users_key(prefix, digest)
  return prefix .. ':users:' .. digest
end

-- Tell whether a live lease holds a resource.
local function is_held(prefix, resource, now)
  for _, id in ipairs(redis.call('SMEMBERS', prefix .. ':holders:' .. resource)) do
    if lease_is_live(prefix, id, now) then
      return true
    end
  end
  return false
end

-- Tell whether a set of ref IDs names one that is there.
local function names_a_ref(prefix, set)
  for _, id in ipairs(redis.call('SMEMBERS', set)) do
    if redis.call('EXISTS', prefix .. ':ref:' .. id) == 1 then
      return true
    end
    redis.call('SREM', set, id)
  end
  return false
end

-- Turn a blob that is present, and that no ref uses and no live lease holds, absent: in the same step its object is to
-- be deleted, after *grace* milliseconds. Return the bytes of the object, or nil where the blob stays or isn't there.
local function blob_condemn(prefix, digest, now, grace)
  local blob = prefix .. ':blob:' .. digest
  local value = redis.call('GET', blob)
  if not value or is_held(prefix, 'blob:' .. digest, now) or names_a_ref(prefix, users_key(prefix, digest)) then
    return nil
  end
  local record = cmsgpack.unpack(value)[3]
  redis.call('DEL', blob, prefix .. ':holders:blob:' .. digest)
  redis.call('ZADD', prefix .. ':deleting', now + grace, digest .. ' ' .. record.key)
  return record.size_bytes
end

-- Let go of an image's documents, unless an image has them that is there still. Return the bytes that are freed by it.
local function documents_release(prefix, manifest, config, now, grace)
  if redis.call('HEXISTS', prefix .. ':images:digest', manifest) == 1 then
    return 0
  end
  lease_drop(prefix, 'image:' .. manifest)
  return (blob_condemn(prefix, manifest, now, grace) or 0) + (blob_condemn(prefix, config, now, grace) or 0)
end
